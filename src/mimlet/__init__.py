"""mimlet: masked-image-modeling pre-training and distillation of lightweight vision transformers.

The public names are those of `__all__`; they are imported when they are first used, so that `import mimlet` is
immediate.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimlet.analyse.verbs import analyse, diagnose
    from mimlet.api import compare, demo, evaluate, export, finetune, pretrain, probe, report, sweep, train
    from mimlet.config import Config, load_config
    from mimlet.data.packing import pack, verify_pack
    from mimlet.data.source import Records
    from mimlet.errors import UserError
    from mimlet.models.features import Features, Taps
    from mimlet.models.foreign import ForeignEncoder
    from mimlet.models.teacher import Teacher
    from mimlet.models.weights import load
    from mimlet.plan import plan

__all__ = [
    "Config",
    "Features",
    "ForeignEncoder",
    "Records",
    "Taps",
    "Teacher",
    "UserError",
    "analyse",
    "compare",
    "demo",
    "diagnose",
    "evaluate",
    "export",
    "finetune",
    "load",
    "load_config",
    "pack",
    "plan",
    "pretrain",
    "probe",
    "report",
    "sweep",
    "train",
    "verify_pack",
]

_ELSEWHERE = {
    "Config": "mimlet.config",
    "Features": "mimlet.models.features",
    "ForeignEncoder": "mimlet.models.foreign",
    "Records": "mimlet.data.source",
    "Taps": "mimlet.models.features",
    "Teacher": "mimlet.models.teacher",
    "UserError": "mimlet.errors",
    "analyse": "mimlet.analyse.verbs",
    "diagnose": "mimlet.analyse.verbs",
    "load": "mimlet.models.weights",
    "load_config": "mimlet.config",
    "pack": "mimlet.data.packing",
    "plan": "mimlet.plan",
    "verify_pack": "mimlet.data.packing",
}


class _Package(ModuleType):
    """Importing the module `mimlet.report` must not hide the function of that name (`analyse`, `demo`,
    `export` and `plan` neither)."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'mimlet' has no attribute '{name}'")
    return getattr(import_module(_ELSEWHERE.get(name, "mimlet.api")), name)


def __dir__() -> list[str]:
    return __all__
