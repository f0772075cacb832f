# make demo: all four stages on the phantom set; make test: the tests. Each makes .venv by itself.
PYTHON ?= python3
PY = .venv/bin/python
RUNS ?= runs

.PHONY: demo test test-slow

demo: .venv/runtime
	$(PY) train_vae.py --config=config/demo_vae.py --output_root=$(RUNS) --run_name=ae_demo
	$(PY) find_latent_scale.py --output_root=$(RUNS) --ae_ckpt_path=$(RUNS)/ae_demo/ckpts/last.pt
	$(PY) train_ldm.py --config=config/demo_ldm.py --output_root=$(RUNS) --run_name=ldm_demo --ae_ckpt_path=$(RUNS)/ae_demo/ckpts/last.pt
	$(PY) sample.py --ckpt=$(RUNS)/ldm_demo/ckpts/last.pt --sampler=dpmpp_sde --num_sampling_steps=20 --guidance_scale=2

test: .venv/dev
	$(PY) -m pytest -m "not slow"

test-slow: .venv/dev
	$(PY) -m pytest -m slow

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	touch $@
