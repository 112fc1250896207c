"""Make ``lm_eval --model mtnlg`` work: lm-evaluation-harness has no entry point for models.

setup.py writes the code below into a .pth file, as coverage does, so every Python process of the
environment runs it at its start. It imports nothing and costs some 0.1 ms. When the harness imports
its list of models, this model is added to it; the class is imported when it is asked for.
"""

import sys

TARGET = "mtnlg_jax.evaluate.harness:MtnlgLM"


class Finder:
    """Find ``lm_eval.models`` as Python does, to add a name to it."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "lm_eval.models":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                # Only now: others may look for the module and not import it.
                if cls in sys.meta_path:
                    sys.meta_path.remove(cls)
                execute(module)
                cls.add(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    @staticmethod
    def add(models):
        """Add the name to the harness. Other releases of it may do without."""
        try:
            from lm_eval.api.registry import model_registry

            models.MODEL_MAPPING.setdefault("mtnlg", TARGET)
            if "mtnlg" not in model_registry:
                model_registry.register("mtnlg", target=TARGET)
        except Exception as error:
            print(f"mtnlg_jax: lm_eval takes no further model ({error})", file=sys.stderr)


if not any(getattr(each, "__name__", "") == "Finder" for each in sys.meta_path):
    sys.meta_path.insert(0, Finder)
