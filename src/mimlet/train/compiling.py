"""`speed.compile`: what of a method `torch.compile` takes, where that pays, and what happens where it fails.

Everything is compiled in a trial before the first step. While steps are computed nothing is compiled any more: what the
trial did not see, another shape for instance, runs as it is written. So do evaluations and pictures. That keeps a run
from compiling for ever, and from failing where it has been running for hours.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from mimlet.config import SpeedSettings
from mimlet.data.batch import Batch
from mimlet.methods.base import Clock, Method
from mimlet.models.cross import CrossDecoder
from mimlet.models.decoders import Decoder
from mimlet.models.encoder import Encoder
from mimlet.train.distributed import copy_of, rehearse

Form = Literal["off", "on", "graphs"]

PAYS_AFTER = 5000
"""Optimiser steps from which on `auto` compiles on a GPU. Compiling student and teacher takes a minute or two; a tenth
or more of a step of 0.1 s pays that back in as many steps.
"""

ROUNDS = {"on": 1, "graphs": 3}
"""Trial steps: a CUDA graph is recorded in the second and replayed in the third."""


def form_of(speed: SpeedSettings, device_type: str, steps: int) -> Form:
    """What `speed.compile` means for a training of so many steps: `auto` compiles on CUDA where the training is long
    enough, and nowhere else (docs/performance.md). Nothing is measured: a resumed run must repeat itself.
    """
    if speed.compile != "auto":
        return speed.compile
    return "on" if device_type == "cuda" and steps >= PAYS_AFTER else "off"


def compiled_parts(method: Method) -> list[nn.Module]:
    """Encoder, those that follow it or that it follows, decoders, and the encoders of frozen parts that are ours."""
    names = {"encoder", *(name for pair in method.ema.items() if "encoder" in pair for name in pair)}
    parts = [part for name in sorted(names) if (part := getattr(method, name)) is not None]
    parts += [part for part in method.children() if isinstance(part, Decoder | CrossDecoder)]
    frozen = (getattr(getattr(method, name), "encoder", None) for name in method.frozen)
    return parts + [part for part in frozen if isinstance(part, Encoder)]


class Compiler:
    """`torch.compile` of one training. Does nothing while it is off."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.parts: list[nn.Module] = []

    def start(self, method: Method, fabric: Fabric, batch: Batch, clock: Clock) -> str:
        """Compiles a method's parts for pieces such as this prepared `batch`. Why it could not, or nothing: then it is
        off from now on.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, of its own code
                self._try(method, fabric, batch, clock)
        except Exception as error:  # whatever the compiler meets: training goes on without it
            self.stop()
            self.form = "off"
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return ""

    def _try(self, method: Method, fabric: Fabric, batch: Batch, clock: Clock) -> None:
        """Steps of a copy, since a method may count them. What it has compiled is found again by the method itself:
        dynamo keeps it with the code.
        """
        self._compile(copied := copy_of(method))
        for _ in range(ROUNDS.get(self.form, 0)):
            self.begin()
            copied.zero_grad()
            rehearse(copied, fabric, batch, clock)
        self._compile(method)
        self.parts = [part for part in compiled_parts(method) if part in self.parts]

    def _compile(self, method: Method) -> None:
        options = {"mode": "reduce-overhead"} if self.form == "graphs" else {}
        for part in compiled_parts(method):
            if part._compiled_call_impl is None:  # several students may share a teacher
                part.compile(dynamic=False, **options)
                self.parts.append(part)

    def begin(self) -> None:
        """Before a piece of a step: what CUDA graphs gave in the last one may be overwritten."""
        if self.form == "graphs":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def own(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes gradients outlast their piece: those that a CUDA graph gave lie in its memory until its next replay."""
        held = [parameter for parameter in parameters if parameter.grad is not None]
        if self.form == "graphs" and held:
            gradients: list[Tensor] = [parameter.grad for parameter in held if parameter.grad is not None]
            for parameter, gradient in zip(held, torch._foreach_mul(gradients, 1.0), strict=True):
                parameter.grad = gradient

    def computing(self) -> AbstractContextManager[None]:
        """While a step is computed: what is compiled is used, and nothing is compiled."""
        return nullcontext() if self.form == "off" else torch.compiler.set_stance("eager_on_recompile")

    def pausing(self) -> AbstractContextManager[None]:
        """Between steps: nothing that is compiled is used."""
        return nullcontext() if self.form == "off" else torch.compiler.set_stance("force_eager")

    def stop(self) -> None:
        """Gives the parts back as they were."""
        for part in self.parts:
            part._compiled_call_impl = None
        self.parts = []
