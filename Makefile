# Two commands are the contract: `make quickstart` and `make test`. Both make their own virtual
# environment and run on a fresh machine that has Python 3.10 or newer and this checkout.

PYTHON ?= python3
VENV ?= .venv
PY ?= $(VENV)/bin/python
WORKERS ?= 2
CONSTRAINTS ?= constraints.txt
# empty leaves mypy out, for versions with other stubs
TYPES ?= yes

# sizes of the quickstart
OUT ?= outputs/quickstart
SCENES ?= 600
HELDOUT ?= 60
EPOCHS ?= 8
HEAD_EPOCHS ?= 30
PICTURES ?= 6

.PHONY: help quickstart quickstart-steps test check docs dist clean

help:
	@echo "make quickstart   install, then extract -> train -> evaluate -> segment on real parts"
	@echo "make test         install, then format, lint, types, docs and all tests"
	@echo "make check        the same without installing"
	@echo "make docs         the documentation site in build/site, warnings are errors"
	@echo "make dist         sdist and wheel in dist/, the wheel tried in an environment of its own"
	@echo "make clean        remove environment and outputs"

$(VENV)/.quickstart: pyproject.toml $(CONSTRAINTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[quickstart]"
	touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@ $(VENV)/.quickstart

quickstart: $(VENV)/.quickstart
	$(MAKE) --no-print-directory quickstart-steps

# The commands of the README, one after the other.
quickstart-steps:
	@printf '\n1. Extract: %s scenes through DINOv2 ViT-S/14 and MiniLM into a feature store\n' $(SCENES)
	$(PY) -m talk2dino.extract source=mosaic source.count=$(SCENES) vision=dinov2_vits14 \
	  vision.layers=null text=minilm images_per_shard=128 store=$(OUT)/store hydra.run.dir=$(OUT)/extract
	@printf '\n2. Train: dense alignment, and beside it the head choice of the paper (max_score)\n'
	$(PY) -m talk2dino.train experiment=quickstart store=$(OUT)/store \
	  trainer.max_epochs=$(EPOCHS) hydra.run.dir=$(OUT)/dense
	$(PY) -m talk2dino.train experiment=quickstart similarity=max_score val_similarity=pooled \
	  store=$(OUT)/store trainer.max_epochs=$(HEAD_EPOCHS) hydra.run.dir=$(OUT)/max_score
	@printf '\n3. Evaluate on %s held-out scenes, sliding windows and PAMR\n' $(HELDOUT)
	$(PY) -m talk2dino.evaluate checkpoint=$(OUT)/dense benchmark=mosaic pamr=true \
	  benchmark.count=$(HELDOUT) pictures=$(PICTURES) compare_untrained=true \
	  hydra.run.dir=$(OUT)/evaluate/dense
	$(PY) -m talk2dino.evaluate checkpoint=$(OUT)/max_score benchmark=mosaic pamr=true \
	  benchmark.count=$(HELDOUT) pictures=0 hydra.run.dir=$(OUT)/evaluate/max_score
	@printf '\n4. Segment an unmodified photograph with words of your own\n'
	$(PY) -c "import shutil, sklearn.datasets as d; \
	  shutil.copy(d.__path__[0] + '/images/flower.jpg', '$(OUT)/photograph.jpg')"
	$(PY) -m talk2dino.segment checkpoint=$(OUT)/dense image=$(OUT)/photograph.jpg \
	  'classes=[dahlia,dark leaves]' output=$(OUT)/segmented.png
	$(PY) -m talk2dino.compare $(OUT)/evaluate/dense $(OUT)/evaluate/max_score
	@printf '\nPictures\n  %s\n  %s\n  %s\n' "$(OUT)/segmented.png   the photograph, segmented" \
	  "$(OUT)/evaluate/dense/pictures/   held-out scenes: image, truth, prediction" \
	  "$(OUT)/dense/loss.png   loss and recall"
	@printf 'Next\n  %s\n  %s\n  %s\n' \
	  "$(PY) -m talk2dino.calibrate checkpoint=$(OUT)/dense store=$(OUT)/store   (better masks, in seconds)" \
	  "$(PY) -m talk2dino.segment checkpoint=$(OUT)/dense image=YOUR.jpg 'classes=[coffee cup,table]'" \
	  "README.md, \"Train on your own captions\""

test: $(VENV)/.dev
	$(MAKE) --no-print-directory check

check:
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(if $(strip $(TYPES)),$(PY) -m mypy)
	$(MAKE) --no-print-directory docs
	$(PY) -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

docs:
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

# The installed command is asked from a folder without the checkout's files.
dist: $(VENV)/.dev
	rm -rf dist build/wheel
	$(PY) -m build --outdir dist
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) dist/*.whl
	cd build/wheel && bin/talk2dino --version && bin/talk2dino train --cfg job store=DIR > train.yaml

clean:
	rm -rf $(VENV) outputs multirun dist build .pytest_cache .mypy_cache .ruff_cache
