"""What a run says while it runs: plain lines, JSONL, a progress bar, and TensorBoard or W&B when asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lldfast.errors import CorruptError, MissingDependencyError
from lldfast.files import atomic_path, explain_write_errors
from lldfast.run.folder import MethodFolder


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Records of a JSONL file; an unfinished last line (a kill while writing) is dropped, any other damage is an error."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) - 1:
                break
            raise CorruptError(f"{path}, line {number + 1}: {error}") from None
    return records


class JsonlLog:
    """An append-only JSONL file, one record a line, flushed at once."""

    def __init__(self, path: str | Path, *, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """Open for appending. `keep` drops records of steps that a resumed run is going to repeat."""
        self.path = Path(path)
        records = [record for record in read_jsonl(self.path) if keep is None or keep(record)]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        with explain_write_errors(self.path):
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        with explain_write_errors(self.path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class RunLog:
    """Training log of one method: `log.jsonl`, lines on stderr, progress bar, optional TensorBoard and W&B."""

    def __init__(
        self,
        folder: MethodFolder,
        *,
        total: int,
        start: int = 0,
        progress: bool = True,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        """`start` is the step a resumed run begins at; records of later steps are dropped, they will come again.

        Raises:
            MissingDependencyError: TensorBoard or W&B was asked for and is not installed.
        """
        self.name, self.total = folder.name, total
        self.jsonl = JsonlLog(folder.log, keep=lambda record: record["step"] < start)
        # a bar only where someone watches; a log file gets plain lines instead
        watched = progress and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, desc=self.name, unit="step", leave=True) if watched else None
        self._writer: Any = None
        self._wandb: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingDependencyError("TensorBoard logging needs: pip install 'lldfast[log]'") from error
            self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=start)
        if wandb:
            try:
                import wandb as wb
            except ImportError as error:
                raise MissingDependencyError("W&B logging needs: pip install 'lldfast[log]'") from error
            self._wandb = wb.init(project=wandb, name=self.name, config=config, dir=str(folder.path), resume="allow")

    def step(self, record: dict[str, Any], *, line: bool) -> None:
        """Log one record (it has "step"); `line` also prints it when no progress bar is shown."""
        self.jsonl.write(record)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        elif line:
            self.say(
                f"step {record['step']}/{self.total}  loss {record['loss']:.4f}  |g| {record['grad_norm']:.2f}  "
                f"lr {record['lr']:.2e}  {record['tokens_per_s']:,.0f} tok/s"
            )
        for key, value in _scalars(record):
            if self._writer is not None:
                self._writer.add_scalar(key, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(dict(_scalars(record)), step=record["step"])

    def measured(self, record: dict[str, Any]) -> None:
        """Show a measurement (its file is the caller's)."""
        true = "" if record.get("true_kl") is None else f"  true KL {record['true_kl']:.3f}"
        self.say(f"step {record['step']}/{self.total}  KL {record['kl']:.2f}{true} bits/byte  NLL gap {record['nll_gap']:.3f}")
        for key, value in _scalars(record):
            if self._writer is not None:
                self._writer.add_scalar(f"measure/{key}", value, record["step"])
        if self._wandb is not None:
            self._wandb.log({f"measure/{key}": value for key, value in _scalars(record)}, step=record["step"])

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def say(self, text: str) -> None:
        tqdm.write(f"[{self.name}] {text}", file=sys.stderr)

    def close(self) -> None:
        self.jsonl.close()
        if self.bar is not None:
            self.bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            flat += [(f"{key}/{name}", float(v)) for name, v in value.items() if v is not None]
        elif isinstance(value, (int, float)) and key != "step":
            flat.append((key, float(value)))
    return flat
