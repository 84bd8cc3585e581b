"""What a training shows on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mimlet.untrusted import printable


class Display:
    """Progress on the first process: a bar on a terminal, elsewhere a line per log, on standard error.

    Of several trainings (`names`) it shows each one's loss, when all have logged.
    """

    def __init__(self, total: int, shown: bool, names: Sequence[str]) -> None:
        self.total, self.names = total, names
        self.console = Console(stderr=True, quiet=not shown)
        columns = (BarColumn(bar_width=10), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        self.bar = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self.waiting: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> Display:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def prefix(self, name: str) -> str:
        """Which training a sentence is about, where there are several."""
        return f"{name}: " if len(self.names) > 1 else ""

    def say(self, text: str) -> None:
        """A sentence."""
        self.console.print(printable(text, lines=True), highlight=False, markup=False, soft_wrap=True)

    def update(
        self,
        name: str,
        step: int,
        epoch: float,
        losses: Mapping[str, float],
        values: Mapping[str, float],
        seconds_left: float,
    ) -> None:
        """The newest averages, and the time left. A total of one loss is not repeated."""
        shown = losses if len(losses) > 2 else {"loss": losses["total"]}
        if len(self.names) > 1:
            self.waiting[name] = (losses["total"], seconds_left)
            if name != self.names[-1]:
                return
            shown = {name: loss for name, (loss, _) in self.waiting.items()}
            seconds_left = sum(left for _, left in self.waiting.values())
            self.waiting = {}
        speed = f"{values['images_per_second']:.4g} img/s  " if len(self.names) < 2 else ""
        text = (
            f"epoch {epoch:.2f}  {', '.join(f'{name} {value:.4f}' for name, value in shown.items())}  "
            f"{speed}left {timedelta(seconds=round(seconds_left))}  "
            f"lr {values['lr']:.2e}  data {values['data_wait']:.0%}  {values['memory_mb'] / 1000:.1f} GB"
        )
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        else:
            self.say(f"step {step}/{self.total}  {text}")
