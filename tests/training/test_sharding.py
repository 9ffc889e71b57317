"""What is running against what was asked for, scalars under DeepSpeed, and the configuration files of the examples."""

import copy
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers.distributed import DistributedConfig

import pretrain_unicl
from tests.gloo_ranks import run_ranks
from tests.tiny_florence import CONTEXT, VOCABULARY, random_pixels, tiny_model
from transformers_florence import FlorenceModel, load_checkpoint
from transformers_florence.training.gradient_cache import cached_backward
from transformers_florence.training.objectives import ContrastiveObjective
from transformers_florence.training.sharding import (
    average_whole_gradients,
    check_running,
    configure_deepspeed,
    guarded_step,
    keep_scalars_as_vectors,
    make_accelerator,
    save_whole,
    shard_fully,
    zero_stage,
)
from transformers_florence.training.stability import GuardedUpdate

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
LABELS = torch.tensor([0, 1, 0, 2])
STAGES = [1, 2, 3]
ENVIRONMENT = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def without_a_launcher(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def inputs_of() -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCABULARY - 2, (len(LABELS), CONTEXT), generator=torch.Generator().manual_seed(6))
    tokens[:, 0], tokens[:, -1] = VOCABULARY - 2, VOCABULARY - 1
    return {"pixel_values": random_pixels(len(LABELS)), "input_ids": tokens}


def sigmoid_objective() -> ContrastiveObjective:
    """With both of the scalar weights there are; the same each time."""
    torch.manual_seed(5)
    return ContrastiveObjective(tiny_model(), objective="sigmoid", num_labels=3)


class DeepSpeedEngine(nn.Module):
    """Has the name and the answer of DeepSpeed's own."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage = stage

    def zero_optimization_stage(self) -> int:
        return self.stage


def deepspeed_accelerator(config: dict[str, Any], processes: int = 2) -> Any:
    """What of an accelerator under DeepSpeed is looked at."""
    return SimpleNamespace(
        num_processes=processes,
        distributed_type=DistributedType.DEEPSPEED,
        device=torch.device("cpu"),
        deepspeed_plugin=SimpleNamespace(deepspeed_config=config),
    )


# What was asked for


def test_one_process_says_what_it_is():
    accelerator = make_accelerator()
    assert zero_stage(accelerator) is None
    assert check_running(accelerator, nn.Linear(1, 1)) == f"float32 on 1 x {accelerator.device.type}, Linear"
    assert check_running(accelerator, nn.Linear(1, 1), torch.bfloat16).startswith("bfloat16 on 1 x ")


def test_processes_that_a_launcher_dropped_are_missed(monkeypatch):
    with pytest.raises(ValueError, match="expected 2 processes that train together, got 1; on CPUs launch them by"):
        make_accelerator(processes=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="expected 3 processes"):
        make_accelerator()


def test_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="one process, DDP or DeepSpeed, got FSDP"):
        make_accelerator()


def test_processes_that_would_not_exchange_gradients_are_noticed():
    """As Accelerate leaves them on CPUs for FSDP, or with a backend alone: two ranks, and no wrapper."""
    accelerator = SimpleNamespace(num_processes=2, distributed_type=DistributedType.NO)
    with pytest.raises(ValueError, match="expected a model in DistributedDataParallel, got Linear"):
        check_running(accelerator, nn.Linear(1, 1))


def test_deepspeed_that_does_not_run_as_asked_is_noticed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="expected a model in DeepSpeedEngine, got Linear"):
        check_running(SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO), nn.Linear(1, 1))
    accelerator = deepspeed_accelerator({"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match="expected ZeRO-3, got ZeRO-2"):
        check_running(accelerator, DeepSpeedEngine(2))
    assert check_running(accelerator, DeepSpeedEngine(3)) == "float32 on 2 x cpu, DeepSpeedEngine with ZeRO-3"


def test_another_precision_than_accelerates_is_noticed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="mixed precision 'bf16' that Accelerate was asked for, got 'no'"):
        check_running(make_accelerator(mixed_precision="no"), nn.Linear(1, 1))
    check_running(make_accelerator(mixed_precision="no"), nn.Linear(1, 1), torch.bfloat16)


# DeepSpeed's configuration


def test_deepspeed_learns_of_the_arguments():
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "train_batch_size": 12}
    configure_deepspeed(deepspeed_accelerator(config, processes=3), 12, 0.5)
    assert config == {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
    }
    configure_deepspeed(deepspeed_accelerator(config, processes=3), 12, 0.5, torch.bfloat16)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    configure_deepspeed(Accelerator(), 12, 0.5)  # without DeepSpeed there is nobody to tell


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping: expected 0.5 or 'auto', got 1.0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: expected 1 or 'auto', got 2"),
        ({"train_batch_size": 8}, "train_batch_size: expected 12 or 'auto', got 8"),
        ({"bf16": {"enabled": True}}, "bf16: expected none, .* got it enabled"),
        ({"fp16": {"enabled": True}}, "fp16: expected none"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast: expected none"),
    ],
)
def test_another_configuration_of_deepspeed_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        configure_deepspeed(deepspeed_accelerator(config), 12, 0.5)


def test_deepspeed_and_float16_are_refused():
    with pytest.raises(ValueError, match="expected float32 or bfloat16 with DeepSpeed, got float16"):
        configure_deepspeed(deepspeed_accelerator({}), 12, 0.5, torch.float16)


# Scalars


def test_scalars_are_vectors_inside_and_scalars_outside():
    ours, plain = sigmoid_objective(), sigmoid_objective()
    keep_scalars_as_vectors(ours)
    scalars = {name for name, weight in plain.named_parameters() if weight.ndim == 0}
    assert scalars == {"logit_bias", "model.logit_scale"}
    for (name, weight), (other, expected) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and weight.shape == ((1,) if name in scalars else expected.shape)
    results = []
    for objective in (ours, plain):
        outputs = objective(**inputs_of())
        loss = objective.loss(**outputs, labels=LABELS, class_labels=LABELS)
        loss.backward()
        gradients = {name: weight.grad.reshape(-1) for name, weight in objective.named_parameters()}
        results.append(({name: value.detach() for name, value in outputs.items()}, loss.detach(), gradients))
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert all(results[0][2][name].abs().item() > 1e-6 for name in scalars)


def test_saved_folders_know_nothing_of_it(tmp_path):
    objective, plain = sigmoid_objective(), sigmoid_objective().model
    keep_scalars_as_vectors(objective)
    accelerator = make_accelerator()
    save_whole(accelerator, accelerator.prepare(objective), objective.model, tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "plain"))
    assert ours["logit_scale"].shape == ()
    assert_close(ours, expected, rtol=0, atol=0)
    configs = [json.loads((tmp_path / name / "config.json").read_text("utf-8")) for name in ("ours", "plain")]
    assert configs[0] == configs[1]
    loaded = load_checkpoint(FlorenceModel, tmp_path / "ours")
    assert_close(loaded.state_dict(), plain.state_dict(), rtol=0, atol=0)


# The guarded step


def guarded(model: FlorenceModel, chunk: int, factor: float = 1.0, **options: Any) -> tuple[Any, GuardedUpdate]:
    accelerator = Accelerator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    update = GuardedUpdate(accelerator, optimizer, None, model.parameters(), **options)
    objective = ContrastiveObjective(model)

    def loss(**outputs: torch.Tensor) -> torch.Tensor:
        return factor * objective.loss(**outputs, labels=LABELS)

    step = guarded_step(
        update, wrapped, loss, inputs_of(), chunk, shared=objective.shared_outputs, step=0, samples=["a"]
    )
    return step, update


@pytest.mark.parametrize("chunk", [3, 4])
def test_a_guarded_step_is_the_step(chunk):
    torch.manual_seed(5)
    ours = tiny_model()
    plain = copy.deepcopy(ours)
    step, _ = guarded(ours, chunk)
    objective = ContrastiveObjective(plain)
    loss = cached_backward(plain, partial(objective.loss, labels=LABELS), inputs_of(), len(LABELS))
    norm = torch.cat([weight.grad.flatten() for weight in plain.parameters()]).norm()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert step.taken
    assert_close(step.loss, loss, rtol=1e-5, atol=1e-6)
    assert step.gradient_norm == pytest.approx(norm.item(), rel=1e-4)
    assert step.shared["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-4)
    assert not step.loss.requires_grad and not step.shared["logit_scale"].requires_grad
    assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 4])
def test_a_loss_that_is_not_admitted_never_goes_back(chunk, monkeypatch):
    """As under DeepSpeed, whose weights would have been changed by then."""
    model, asked = tiny_model(), []
    before = copy.deepcopy(model.state_dict())

    def admits(self, loss, *, step, samples):
        asked.append((loss.isnan().item(), step, samples))
        return False

    monkeypatch.setattr(GuardedUpdate, "admits", admits)
    monkeypatch.setattr(GuardedUpdate, "__call__", lambda *arguments, **options: pytest.fail("took the step"))
    step, _ = guarded(model, chunk, factor=float("nan"))
    assert asked == [(True, 0, ["a"])]
    assert step.loss.isnan() and step.gradient_norm is None and not step.taken
    assert all(weight.grad is None for weight in model.parameters())
    assert_close(model.state_dict(), before, rtol=0, atol=0)


# FSDP2


def losses_of(objective: ContrastiveObjective, rows: slice, chunk: int) -> list[float]:
    """The losses of twenty steps of plain SGD on some of the rows."""
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.01)
    inputs = {name: value[rows] for name, value in inputs_of().items()}
    loss = partial(objective.loss, labels=LABELS[rows], class_labels=LABELS[rows])
    losses = []
    for _ in range(20):
        losses.append(cached_backward(objective, loss, inputs, chunk, shared=objective.shared_outputs).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def work_of_a_rank(rank: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for chunk in (1, 2):
        objective = sigmoid_objective()
        whole = sum(weight.numel() for weight in objective.parameters())
        shard_fully(objective)
        sharded = [module for module in objective.modules() if isinstance(module, FSDPModule)]
        own = sum(weight.to_local().numel() for weight in objective.parameters())
        losses = losses_of(objective, slice(2 * rank, 2 * rank + 2), chunk)
        save_whole(Accelerator(cpu=True), objective, objective.model, Path(folder) / f"chunks of {chunk}")
        results[f"chunks of {chunk}"] = {"losses": losses, "part": own / whole, "sharded": len(sharded)}
    return results


def assert_moved_alike(found: dict, expected: dict, before: dict) -> None:
    """All weights together moved as far as expected, and in the same direction."""
    assert found.keys() == expected.keys() == before.keys()
    moved, right = (
        torch.cat([(state[name] - before[name]).flatten() for name in before]) for state in (found, expected)
    )
    assert right.norm() > 0.01
    assert (moved - right).norm() <= 1e-3 * right.norm()


def test_two_ranks_with_sharded_weights_are_one(tmp_path):
    plain = sigmoid_objective()
    before = copy.deepcopy(plain.model.state_dict())
    losses = losses_of(plain, slice(None), len(LABELS))
    expected = plain.model.state_dict()
    (tmp_path / "ranks").mkdir()
    for results in run_ranks(partial(work_of_a_rank, folder=str(tmp_path)), 2, tmp_path / "ranks"):
        for name, result in results.items():
            assert result["losses"] == pytest.approx(losses, rel=1e-5)
            assert result["part"] == pytest.approx(0.5, abs=0.05)
            assert result["sharded"] == 3 + 2 + 1  # layers of the towers, and the rest
            found = load_checkpoint(FlorenceModel, tmp_path / name).state_dict()
            assert_moved_alike(found, expected, before)


# transformers' own FSDP2


def work_of_a_native_rank(rank: int, folder: str) -> dict[str, Any]:
    model = FlorenceModel.from_pretrained(f"{folder}/start", distributed_config=DistributedConfig(fsdp_size=2))
    average_whole_gradients(model)
    whole = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    groups = sum(isinstance(module, FSDPModule) for module in model.modules())
    losses = losses_of(ContrastiveObjective(model), slice(2 * rank, 2 * rank + 2), 1)
    model.save_pretrained(f"{folder}/end")
    return {"losses": losses, "whole": whole, "groups": groups, "scale": model.logit_scale.item()}


def test_a_model_that_transformers_loads_in_pieces_is_one(tmp_path):
    torch.manual_seed(5)
    plain = tiny_model()
    plain.save_pretrained(tmp_path / "start")
    (tmp_path / "ranks").mkdir()
    losses = losses_of(ContrastiveObjective(plain), slice(None), len(LABELS))
    assert losses[-1] < losses[0]
    results = run_ranks(partial(work_of_a_native_rank, folder=str(tmp_path)), 2, tmp_path / "ranks")
    for result in results:
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
        assert result["whole"] == ["logit_scale"] and result["groups"] == 3 + 2 + 1
        assert result["scale"] == pytest.approx(plain.logit_scale.item(), rel=1e-5)
    before, found = (load_checkpoint(FlorenceModel, tmp_path / name).state_dict() for name in ("start", "end"))
    assert_moved_alike(found, plain.state_dict(), before)
    config = json.loads((tmp_path / "end" / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["FlorenceModel"] and "distributed_config" not in config


# Configuration files


def test_every_file_is_named_by_the_script():
    files = sorted(path.name for folder in ("accelerate", "deepspeed") for path in (CONFIGS / folder).iterdir())
    assert len(files) == 9
    assert all(f"`{name}`" in pretrain_unicl.__doc__ for name in files)


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("one_gpu", "NO", 1, 1),
        ("eight_gpus", "MULTI_GPU", 1, 8),
        ("multi_node", "MULTI_GPU", 4, 32),
        *((f"zero{stage}", "DEEPSPEED", 1, 8) for stage in STAGES),
    ],
)
def test_accelerate_reads_its_files(name, kind, machines, processes):
    file = CONFIGS / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))  # refuses keys that it does not know
    assert config.distributed_type == DistributedType(kind)
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.use_cpu is False
    assert "gradient_clipping" not in file.read_text("utf-8")  # the script's, or DeepSpeed's file
    if kind == "DEEPSPEED":
        values = yaml.safe_load(file.read_text("utf-8"))["deepspeed_config"]
        assert ROOT / values["deepspeed_config_file"] == CONFIGS / "deepspeed" / f"{name}.json"
        assert values["zero3_init_flag"] is False


def configured(stage: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Accelerate reads from a file, with the script's defaults in it."""
    for name in ("GRADIENT_CLIPPING", "DEEPSPEED_CONFIG_FILE", "DEEPSPEED_ZERO3_INIT", "CONFIG_DS_FIELDS"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    plugin = DeepSpeedPlugin(hf_ds_config=str(CONFIGS / "deepspeed" / f"zero{stage}.json"), zero3_init_flag=False)
    accelerator = deepspeed_accelerator(plugin.deepspeed_config)
    assert zero_stage(accelerator) == plugin.zero_stage == stage
    assert plugin.offload_optimizer_device == "cpu"
    assert plugin.offload_param_device == ("cpu" if stage == 3 else "none")
    assert plugin.zero3_save_16bit_model is (stage == 3)  # or nothing could be saved
    arguments = pretrain_unicl.PretrainArguments()
    configure_deepspeed(accelerator, arguments.batch_size, arguments.max_grad_norm)
    return plugin.deepspeed_config


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeeds_files_leave_to_the_script_what_is_its_own(stage, monkeypatch):
    config = configured(stage, monkeypatch)
    assert config["gradient_clipping"] == pretrain_unicl.PretrainArguments.max_grad_norm == 1.0
    assert config["train_batch_size"] == 2 * config["train_micro_batch_size_per_gpu"] == 256


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_reads_its_files(stage, monkeypatch):
    reason = "needs DeepSpeed: pip install 'transformers_florence[deepspeed]'"
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config", reason=reason)
    values = configured(stage, monkeypatch)
    values |= {"train_batch_size": values["train_micro_batch_size_per_gpu"]}  # of this one process
    config = deepspeed_config.DeepSpeedConfig({k: v for k, v in values.items() if k != "steps_per_print"})
    assert config.zero_optimization_stage == stage and config.gradient_clipping == 1.0
    assert config.zero_config.offload_optimizer.device == "cpu"
    assert (config.zero_config.offload_param is not None) is (stage == 3)
    assert config.zero_config.gather_16bit_weights_on_model_save is (stage == 3)
