from lib.diffusers_io import *  # noqa: F403, until every caller imports lib.diffusers_io
