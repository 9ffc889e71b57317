"""What fine-tuning scripts share, on a model of a few numbers: the loop against steps by hand, and interruptions."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import ModelOutput

from transformers_florence.training import recipe
from transformers_florence.training.recipe import RecipeArguments, StepBatches, fine_tune, replace_folder
from transformers_florence.training.stability import NonFiniteError
from transformers_florence.training.tracking import read_log

ROWS, WIDTH, BATCH, EPOCHS = 10, 3, 4, 3  # two rows of an epoch are left out
STEPS = ROWS // BATCH * EPOCHS


@dataclass
class Arguments(RecipeArguments):
    epochs: int = EPOCHS
    batch_size: int = BATCH
    learning_rate: float = 0.1
    warmup_steps: int = 1
    log_every: int = 1
    blocks: int = 0
    mode: str = "a"

    from_zero: ClassVar = (*RecipeArguments.from_zero, "blocks")
    choices: ClassVar = {**RecipeArguments.choices, "mode": ("a", "b")}


class Batches(StepBatches):
    """A row is its number and noise."""

    def __init__(self, arguments: RecipeArguments, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(arguments, ROWS, rank, ranks)

    def sample(self, row: int) -> torch.Tensor:
        return torch.cat([torch.tensor([float(row)]), torch.randn(WIDTH - 1)])

    def collate(self, samples: list[torch.Tensor]) -> dict[str, Any]:
        return {"x": torch.stack(samples)}


class Model(nn.Module):
    """A line through dropout, so that a step's own random numbers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> ModelOutput:
        error = self.line(F.dropout(x, 0.5, self.training))[:, 0] - x.sum(1)
        parts = {"square": error.square().mean(), "size": error.abs().mean()}
        return ModelOutput(loss=sum(parts.values()), loss_dict=parts)


def weight_of(model: nn.Module) -> float:
    return model.line.weight.sum().item()


def run(
    output: Path, *, model: nn.Module | None = None, scored: list | None = None, evaluates=True, **changes
) -> dict:
    arguments = Arguments(output=str(output), report_to="local", **changes)
    accelerator = arguments.make_accelerator()
    model = model or Model()

    def evaluate(model: nn.Module) -> dict[str, Any]:
        assert not model.training
        value = weight_of(model)
        if scored is not None:
            scored.append(value)
        return {"weight": value, "rows": [1, 2]}

    def save(model: nn.Module, folder: Path) -> None:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")

    kept = {"evaluate": evaluate, "best": "weight"} if evaluates else {}
    groups = [{"params": list(model.parameters()), "weight_decay": 0.01}]
    return fine_tune(arguments, accelerator, model, groups, Batches(arguments), save=save, **kept)


def by_hand(seed: int = 0, average: float = 0.0) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """The same run written out: the last weights, and those (or their average) at each epoch's end."""
    torch.manual_seed(seed)
    model, batches = Model(), Batches(Arguments(seed=seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, STEPS)
    mean, epochs = None, []
    for step in range(STEPS):
        torch.manual_seed((seed << 32) + step)
        model(**batches[step]["inputs"]).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        now = {name: value.clone() for name, value in model.state_dict().items()}
        if average:
            mean = {name: mean[name].lerp(now[name], 1 - average) for name in now} if mean else now
        if (step + 1) % (ROWS // BATCH) == 0:
            epochs.append(mean or now)
    return now, epochs


def test_a_run_takes_the_steps_that_it_says(tmp_path):
    scored: list[float] = []
    scores = run(tmp_path, scored=scored)
    last, epochs = by_hand()
    found = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert all(torch.equal(found[name], last[name]) for name in last)
    sums = [epoch["line.weight"].sum().item() for epoch in epochs]
    assert scored == sums and scores == {"weight": sums[-1], "rows": [1, 2]}
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert best["line.weight"].sum().item() == max(sums)
    content = json.loads((tmp_path / "best" / "scores.json").read_text())
    assert content == {"step": 2 * (1 + sums.index(max(sums))), "weight": max(sums), "rows": [1, 2]}
    rows = read_log(tmp_path / "log.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert math.isclose(float(row["loss"]), float(row["square"]) + float(row["size"]), abs_tol=2e-4)
    assert [float(row["weight"]) for row in rows if row.get("weight")] == pytest.approx(sums)
    assert json.loads((tmp_path / "arguments.json").read_text())["learning_rate"] == 0.1


def test_the_average_is_what_is_scored_and_kept(tmp_path):
    scored: list[float] = []
    run(tmp_path, scored=scored, ema_decay=0.7)
    last, epochs = by_hand(average=0.7)
    assert scored == pytest.approx([epoch["line.weight"].sum().item() for epoch in epochs], abs=1e-6)
    assert abs(scored[-1] - last["line.weight"].sum().item()) > 1e-3


@pytest.mark.parametrize("ema_decay", [0.0, 0.7])
def test_a_run_that_is_asked_to_stop_goes_on_as_if_it_had_not_been(ema_decay, tmp_path, monkeypatch):
    whole: list[float] = []
    run(tmp_path / "whole", scored=whole, ema_decay=ema_decay)
    asked = iter([False, False, True])
    monkeypatch.setattr(recipe.StopRequest, "requested", lambda self, accelerator: next(asked))
    parts: list[float] = []
    run(tmp_path / "parts", scored=parts, ema_decay=ema_decay)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-3"]
    run(tmp_path / "parts", scored=parts, ema_decay=ema_decay)
    assert parts == whole
    for name in ("best/model", f"checkpoint-{STEPS}/model"):
        one, other = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_without_scores_the_last_model_is_kept(tmp_path):
    assert run(tmp_path, evaluates=False) == {}
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(best[name], value) for name, value in by_hand()[0].items())


def test_a_run_with_other_arguments_is_refused_but_not_with_another_log(tmp_path):
    run(tmp_path)
    assert run(tmp_path, log_every=2, keep=3) == {}  # all steps have been taken
    with pytest.raises(ValueError, match="holds another run: .*learning_rate 0.1 there and 0.2 now, mode 'a' there"):
        run(tmp_path, learning_rate=0.2, mode="b")


def test_a_loss_that_is_not_finite_names_the_rows(tmp_path):
    model = Model()
    with torch.no_grad():
        model.line.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="step 0.*row "):
        run(tmp_path, model=model)


def test_ranks_and_workers_do_not_change_a_batch():
    arguments = Arguments()
    whole, parts = Batches(arguments), [Batches(arguments, rank, 2) for rank in (0, 1)]
    for step in (0, 3):
        together = torch.cat([part[step]["inputs"]["x"] for part in parts])
        assert torch.equal(together, whole[step]["inputs"]["x"])
        assert [name for part in parts for name in part[step]["names"]] == whole[step]["names"]
    rows = [row for step in (0, 1) for row in whole.rows(step)]
    assert len(set(rows)) == 2 * BATCH and rows != [row for step in (2, 3) for row in whole.rows(step)]
    state = torch.get_rng_state()
    _ = whole[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "rank", "message"),
    [
        ({"batch_size": 11}, (), "expected at least batch_size=11 samples, got 10"),
        ({"batch_size": 3}, (0, 2), "batch_size: expected a multiple of 2 processes, got 3"),
        ({"batch_size": 2.5}, (), "batch_size: expected an integer >= 1, got 2.5"),
        ({"epochs": True}, (), "epochs: expected an integer >= 1, got True"),
        ({"blocks": -1}, (), "blocks: expected an integer >= 0, got -1"),
        ({"learning_rate": math.nan}, (), "learning_rate: expected a finite number >= 0, got nan"),
        ({"output": 3}, (), "output: expected a text, got 3"),
        ({"mode": "c"}, (), "mode: expected one of a, b, got 'c'"),
        ({"precision": "float16"}, (), "precision: expected one of auto, float32, bfloat16"),
        ({"ema_decay": 1.0}, (), "ema_decay: expected less than 1, got 1.0"),
        ({"seed": 1 << 31}, (), "seed: expected less than 2 to the power of 31"),
    ],
)
def test_arguments_that_are_refused(changes: dict, rank: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        Batches(Arguments(**changes), *rank)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "best"

    def write(text: str, fails: bool = False):
        def into(place: Path) -> None:
            place.mkdir()
            (place / "a").write_text(text)
            if fails:
                raise Killed

        return into

    replace_folder(folder, write("first"))
    with pytest.raises(Killed):
        replace_folder(folder, write("second", fails=True))
    assert (folder / "a").read_text() == "first"
    move, moves = recipe.os.replace, iter([True, False])

    def killed_between(source, target) -> None:
        if not next(moves):
            raise Killed
        move(source, target)

    monkeypatch.setattr(recipe.os, "replace", killed_between)
    with pytest.raises(Killed):
        replace_folder(folder, write("third"))
    monkeypatch.undo()
    assert not folder.exists() and (tmp_path / "best.former" / "a").read_text() == "first"
    with pytest.raises(Killed):
        replace_folder(folder, write("fourth", fails=True))
    assert (folder / "a").read_text() == "first"
    replace_folder(folder, write("fifth"))
    assert (folder / "a").read_text() == "fifth" and [path.name for path in tmp_path.iterdir()] == ["best"]
