"""Look inside a model: logit lens, attention, loss by token, patches, influential passages.

--help shows examples and every flag. The code is in mtnlg_jax/cli/inspect.py.
"""

import os
import sys

# Python puts the folder of a started script first in sys.path. For all scripts of this folder
# `import inspect` would find this file in place of the standard library's module, which dataclasses
# and others import. So this file hands such an import on, and when started it leaves the path.
_HERE = os.path.dirname(os.path.realpath(__file__))
_ELSEWHERE = [path for path in sys.path if os.path.realpath(path or os.curdir) != _HERE]

if __name__ == "inspect":
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _spec = PathFinder.find_spec("inspect", _ELSEWHERE)
    # An import returns what sys.modules holds at its end.
    sys.modules["inspect"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["inspect"])
else:
    sys.path[:] = _ELSEWHERE
    from mtnlg_jax.cli.inspect import main, run

    __all__ = ["main", "run"]

if __name__ == "__main__":
    run()
