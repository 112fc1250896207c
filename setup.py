"""Installs mtnlg_jax. Ranges say what the code is written for; launch/constraints.txt says what is
tested."""

import base64
import hashlib
import re
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
# Read, not imported: a build runs in an environment of its own, where this folder is not
# importable.
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "mtnlg_jax/__init__.py").read_text(), re.MULTILINE
)[1]
# Python runs the lines of .pth files that begin with "import" at its start.
PLUGIN = "mtnlg_jax_lm_eval.pth"


def plugin() -> str:
    """Return mtnlg_jax/evaluate/plugin.py as one line that cannot fail."""
    code = (ROOT / "mtnlg_jax/evaluate/plugin.py").read_text()
    inside = "".join(f"    {line}\n" for line in code.splitlines())
    return f"import sys; exec({f'try:{chr(10)}{inside}except Exception: pass'!r}, {{}})\n"


class BuildWithPlugin(build_py):
    """Put the .pth file beside the package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            (Path(self.build_lib) / PLUGIN).write_text(plugin())

    def get_outputs(self, *args, **options):
        return [*super().get_outputs(*args, **options), str(Path(self.build_lib) / PLUGIN)]


class EditableWithPlugin(editable_wheel):
    """Put the .pth file into the wheel of an editable installation, which has links alone."""

    def run(self):
        super().run()
        (path,) = Path(self.dist_dir).glob("*.whl")
        content = plugin().encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        with zipfile.ZipFile(path) as wheel:
            files = {each.filename: wheel.read(each) for each in wheel.infolist()}
        record = next(name for name in files if name.endswith(".dist-info/RECORD"))
        files[record] += f"{PLUGIN},sha256={digest},{len(content)}\n".encode()
        # RECORD comes last.
        files = {PLUGIN: content, **files}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            for name, data in files.items():
                wheel.writestr(name, data)


setup(
    name="mtnlg_jax",
    version=VERSION,
    description=(
        "Megatron-Turing NLG in JAX and Flax NNX: pretraining, decoding and ranking on any mesh"
    ),
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["mtnlg_jax", "mtnlg_jax.*"]),
    package_data={"mtnlg_jax": ["**/*.json", "**/*.txtpb", "**/*.yaml", "**/page/*"]},
    cmdclass={"build_py": BuildWithPlugin, "editable_wheel": EditableWithPlugin},
    python_requires=">=3.12",
    install_requires=[
        # Pallas and the typing of shard_map move with each minor release of JAX.
        "jax>=0.11.1,<0.13",
        "flax>=0.12.12,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "tensorstore>=0.1.84,<0.2",
        "sentencepiece>=0.2.1,<0.3",
        "tokenizers>=0.22,<0.24",
        # Chat templates. Earlier ones have known ways out of the sandbox.
        "jinja2>=3.1.6,<4",
        "safetensors>=0.8,<0.9",
        # The head of model cards; comes with tokenizers as well.
        "huggingface-hub>=1,<3",
        # config.yml of MaxText.
        "pyyaml>=6,<7",
        "sacrebleu>=2.6,<3",
        "rouge-score>=0.1.2,<0.2",
        # Not rank_bm25: no release since 2022. This one needs NumPy alone.
        "bm25s>=0.3.16,<0.4",
        # The data recipe: mends Unicode, finds the text of HTML, reads WARC, tells languages,
        # classifies, opens URLs.
        "ftfy>=6.3,<7",
        "trafilatura>=2,<3",
        "warcio>=1.7,<2",
        # The top-level domains that e-mail addresses have; comes with trafilatura as well.
        "tld>=0.13,<0.14",
        "py3langid>=0.3,<0.5",
        "scikit-learn>=1.7,<2",
        "fsspec>=2025.3",
        # GPT-2's BPE a few times faster than tokenizers does it, with the same ids.
        "tiktoken>=0.11,<1",
        "numpy>=2.2,<3",
        "pyarrow>=21",
        "zstandard>=0.23,<1",
        "absl-py>=2.1,<3",
        "tqdm>=4.66,<5",
        "matplotlib>=3.10,<4",
        # Images as prefixes of texts; comes with matplotlib as well.
        "pillow>=11,<14",
        "tensorboardX>=2.6.4,<3",
    ],
    entry_points={
        "console_scripts": [
            "mtnlg-pretrain=mtnlg_jax.cli.pretrain:run",
            "mtnlg-generate=mtnlg_jax.cli.generate:run",
            "mtnlg-prepare=mtnlg_jax.cli.prepare:run",
            "mtnlg-evaluate=mtnlg_jax.cli.evaluate:run",
            "mtnlg-bias=mtnlg_jax.cli.bias:run",
            "mtnlg-audit=mtnlg_jax.cli.audit:run",
            "mtnlg-inspect=mtnlg_jax.cli.inspect:run",
            "mtnlg-why=mtnlg_jax.cli.why:run",
            "mtnlg-prove=mtnlg_jax.cli.prove:run",
            "mtnlg-report=mtnlg_jax.cli.report:run",
            "mtnlg-task=mtnlg_jax.cli.task:run",
            "mtnlg-adapt=mtnlg_jax.cli.adapt:run",
            "mtnlg-plan=mtnlg_jax.cli.plan:run",
            "mtnlg-compile-ahead=mtnlg_jax.cli.compile_ahead:run",
            "mtnlg-convert=mtnlg_jax.cli.convert:run",
            "mtnlg-serve=mtnlg_jax.cli.serve:run",
            "mtnlg-model-card=mtnlg_jax.cli.model_card:run",
        ],
    },
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        # Compilers without the chips' libraries. libtpu must be the one that jax[tpu] asks for.
        "ahead": [
            "libtpu==0.0.50.*",
            "jax-cuda12-plugin>=0.12,<0.13",
            "jax-cuda12-pjrt>=0.12,<0.13",
        ],
        # The stages of the data recipe on many machines.
        "ray": ["ray[data]>=2.49,<3"],
        # gs:// and s3:// as places of text to read.
        "cloud": ["gcsfs", "s3fs"],
        # launch/serve.py. msgspec checks bodies; pydantic and FastAPI would do it at ten times the
        # size.
        "serve": [
            "starlette>=1,<2",
            "uvicorn>=0.48,<1",
            "msgspec>=0.20,<1",
            "prometheus-client>=0.21,<1",
        ],
        # Answers by a JSON schema, a regular expression or a grammar.
        "grammar": ["llguidance>=1.7,<2"],
        # launch/evaluate.py --tasks, train.eval_tasks and lm_eval --model mtnlg. No PyTorch comes
        # with it.
        "eval": ["lm-eval>=0.4.13,<0.5"],
        # optimizer.dp_noise_multiplier: what a run spends of its privacy.
        "privacy": ["dp-accounting>=0.6,<0.7"],
        "dev": [
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.14",
            "mypy>=2,<3",
            "nbclient",
            "nbformat",
            "ipykernel",
            "datasketch>=1.6,<3",
            "gguf>=0.17,<1",
            # The extras eval, privacy, serve, grammar and wandb.
            "lm-eval>=0.4.13,<0.5",
            "dp-accounting>=0.6,<0.7",
            "starlette>=1,<2",
            "uvicorn>=0.48,<1",
            "msgspec>=0.20,<1",
            "prometheus-client>=0.21,<1",
            "llguidance>=1.7,<2",
            "wandb>=0.31,<1",
        ],
        # train.trackers: where a run shows its numbers beside TensorBoard.
        "wandb": ["wandb>=0.31,<1"],
        "trackio": ["trackio>=0.43,<1"],
        # RUN/profile.
        "profile": ["xprof>=2.20"],
        # launch/convert.py and --workdir of GGUF files.
        "gguf": ["gguf>=0.17,<1"],
        "benchmarks": ["torch", "transformers", "megatron-core", "grain"],
    },
)
