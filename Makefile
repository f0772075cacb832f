# make demo: all four stages on the phantom set, and a report.
# make test: the fast tests, in minutes.
# make test-all: all tests, with kill storms and, if one is reachable, a Slurm.
# make gpu-check: tests and benchmarks for a machine with a GPU, at most 8 minutes.
# The first three make .venv by themselves.
PYTHON ?= python3
PY = .venv/bin/python
RUNS ?= runs
WORKERS ?= 2
AE = $(RUNS)/ae_demo/ckpts/last.pt
LDM = $(RUNS)/ldm_demo/ckpts/best.pt

.PHONY: demo test test-all gpu-check

demo: .venv/runtime
	$(PY) train_vae.py --config=config/cpu_vae.py --output_root=$(RUNS) --run_name=ae_demo \
		--img_size=64 --ch_mults=1 --max_steps=2700 --disc_start=1350 --sample_every=20
	$(PY) find_latent_scale.py --output_root=$(RUNS) --ae_ckpt_path=$(AE)
	$(PY) train_ldm.py --config=config/cpu_ldm.py --output_root=$(RUNS) --run_name=ldm_demo \
		--ae_ckpt_path=$(AE) --ldm_base_ch=48 --lr=5e-4 --warmup_steps=100 --max_steps=1200 \
		--sample_every=100 --guidance_scale=2 --patience=0
	$(PY) sample.py --ckpt=$(LDM) --real_dir=$(RUNS)/cache/phantom_64/TB/val
	$(PY) report.py $(RUNS)/ldm_demo

test: .venv/dev
	$(PY) -m pytest --numprocesses=$(WORKERS) --ignore=tests/robustness -m "not slow"

test-all: .venv/dev
	$(PY) -m pytest --numprocesses=$(WORKERS)

# If PyTorch is installed already, as on a cluster: make gpu-check PY=python. Every line has a time
# limit of its own, and a line that fails does not stop the next.
BENCH = $(PY) dev/bench.py --latent_size=32 --repeats=5
gpu-check:
	@status=0; set -x; \
	timeout 180 $(PY) -m pytest tests/test_gpu.py -q -s -p no:cacheprovider || status=1; \
	timeout 90 $(BENCH) --only=sample,train --peer --compile=graphs --sampling_steps=8 \
		--json=gpu_check_16.json || status=1; \
	timeout 70 $(BENCH) --only=train --peer --compile=graphs --batch=128 \
		--json=gpu_check_128.json || status=1; \
	timeout 60 $(BENCH) --only=train --compile=on --json=gpu_check_on.json || status=1; \
	timeout 30 $(BENCH) --only=train --compile=off --json=gpu_check_eager.json || status=1; \
	timeout 50 $(BENCH) --only=vae --compile=graphs --img_size=256 --vae_base_ch=64 --vae_batch=8 \
		--json=gpu_check_vae.json || status=1; \
	exit $$status

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	@# lpips would pull in torchvision, whose builds do not import beside the pinned CPU build of torch.
	$(PY) -m pip install --quiet --no-deps lpips==0.1.4
	touch $@
