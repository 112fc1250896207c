"""Keep the harness and the libraries below it from the network, before they are imported."""

import importlib.util
import logging
import os
import sys
import warnings

SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")


def enter() -> None:
    """Switch the libraries of Hugging Face offline, and silence their bars and notes.

    Call it before lm_eval is imported. Raise ValueError where lm_eval is not installed.
    """
    for name in SWITCHES:
        os.environ[name] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "tasks need lm-evaluation-harness, which is not installed; "
            "install it: pip install 'mtnlg_jax[eval]', or pip install 'lm-eval>=0.4.13,<0.5'"
        )
    # Both libraries read the environment once, when they are imported.
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None:
        hub.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    # tqdm asks for widgets, in notebooks.
    warnings.filterwarnings("ignore", message="IProgress not found")
    import datasets

    datasets.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    # It warns of every task whose settings it fills in; errors of ours stop the run.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
