# make demo: all four stages on the phantom set, and a page about it. make test: what must hold, in
# minutes. make test-all: everything, with kill storms and, where one answers, a Slurm. Each of these
# makes .venv by itself. make gpu-check: for a machine with a GPU.
PYTHON ?= python3
PY = .venv/bin/python
RUNS ?= runs
WORKERS ?= 2
AE = $(RUNS)/ae_demo/ckpts/last.pt
LDM = $(RUNS)/ldm_demo/ckpts/best.pt

.PHONY: demo test test-all gpu-check

demo: .venv/runtime
	$(PY) train_vae.py --config=config/demo_vae.py --output_root=$(RUNS) --run_name=ae_demo
	$(PY) find_latent_scale.py --output_root=$(RUNS) --ae_ckpt_path=$(AE)
	$(PY) train_ldm.py --config=config/demo_ldm.py --output_root=$(RUNS) --run_name=ldm_demo \
		--ae_ckpt_path=$(AE)
	$(PY) sample.py --ckpt=$(LDM) --sampler=dpmpp_2m_sde --num_sampling_steps=8 --guidance_scale=2 \
		--real_dir=$(RUNS)/cache/phantom_64/TB/val
	$(PY) report.py $(RUNS)/ldm_demo

test: .venv/dev
	$(PY) -m pytest --numprocesses=$(WORKERS) --ignore=tests/robustness -m "not slow"

test-all: .venv/dev
	$(PY) -m pytest --numprocesses=$(WORKERS)

# What only a GPU can show, in at most 8 minutes. If PyTorch is there already, as on a cluster:
# PY=python.
gpu-check:
	timeout 150 $(PY) -m pytest tests/test_gpu.py -q -p no:cacheprovider
	timeout 110 $(PY) dev/bench.py --only=train,sample --peer --latent_size=32 --json=gpu_check_16.json
	timeout 110 $(PY) dev/bench.py --only=train --peer --latent_size=32 --batch=128 \
		--json=gpu_check_128.json
	timeout 110 $(PY) dev/bench.py --only=vae --img_size=256 --vae_base_ch=64 --vae_batch=8 \
		--json=gpu_check_vae.json

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	@# lpips would pull in torchvision, whose builds do not import beside the pinned CPU build of torch.
	$(PY) -m pip install --quiet --no-deps lpips==0.1.4
	touch $@
