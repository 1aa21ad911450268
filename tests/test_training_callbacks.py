"""The dual stage in others' trainers: which products each step computed, resuming, and what is left attached."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmaq
from fmaq.emulation.attach import policy_of
from fmaq.training import Stage
from fmaq.training.dual_stage import DualStage
from fmaq.training.schedule import Switch

lightning = pytest.importorskip("lightning.pytorch")
transformers = pytest.importorskip("transformers")

from fmaq.training.lightning_callback import DualStageCallback as LightningDualStage  # noqa: E402
from fmaq.training.transformers_callback import DualStageCallback as TransformersDualStage  # noqa: E402

POLICY = fmaq.Policy(accumulator="M5E3b5 product=M5E3b6")
"""Small sums are lost: the stages differ in every product."""
STEPS = 6


class Products:
    """A forward hook that tells by the bits of a linear layer's output which stage computed it, while it trains."""

    def __init__(self, layer: nn.Linear) -> None:
        self.underflows: list[bool] = []
        layer.register_forward_hook(self)

    def __call__(self, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        if not layer.training:
            return
        with torch.no_grad(), torch._C.DisableTorchFunction():
            stages = [
                torch.equal(output, fmaq.linear(inputs[0], layer.weight, layer.bias, acc))
                for acc in (POLICY.replace(underflow=False).accumulator, POLICY.accumulator)
            ]
        assert sum(stages) == 1, "neither stage, or it does not show which"
        self.underflows.append(stages[1])


def is_final(model: nn.Module) -> bool:
    return policy_of(model) == POLICY


# transformers


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def sentences() -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 20, (12, 5), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 3} for row in tokens]


def trainer(folder: Path, model: nn.Module, callback: Any, **arguments: Any) -> Any:
    settings = {"max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True}
    settings |= {"disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 1}
    wanted = transformers.TrainingArguments(str(folder), **(settings | arguments))
    return transformers.Trainer(model, wanted, train_dataset=sentences(), callbacks=[callback])


@pytest.mark.parametrize(("when", "from_step"), [({"share": 0.5}, 3), ({"step": 4}, 4), ({"epoch": 1}, 3)])
def test_transformers_trainer_changes_stage(tmp_path: Path, when: dict[str, Any], from_step: int) -> None:
    model = bert()
    products = Products(model.bert.encoder.layer[0].intermediate.dense)
    trainer(tmp_path, model, TransformersDualStage(POLICY, **when)).train()
    assert products.underflows == [step >= from_step for step in range(STEPS)]
    assert is_final(model)


def test_transformers_trainer_resumes_in_the_stage_of_its_step(tmp_path: Path) -> None:
    whole = bert()
    trainer(tmp_path, whole, TransformersDualStage(POLICY, step=3)).train()
    for checkpoint, stages in ((2, [False, True, True, True]), (4, [True, True])):
        model = bert()
        products = Products(model.bert.encoder.layer[0].intermediate.dense)
        again = trainer(tmp_path, model, TransformersDualStage(POLICY, step=3))
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert products.underflows == stages and is_final(model)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_a_step_of_accumulated_batches_is_of_one_stage(tmp_path: Path) -> None:
    model = bert()
    products = Products(model.bert.encoder.layer[0].intermediate.dense)
    callback = TransformersDualStage(POLICY, step=1)
    trainer(tmp_path, model, callback, max_steps=2, gradient_accumulation_steps=3).train()
    assert products.underflows == [False] * 3 + [True] * 3


def test_a_part_of_the_model_and_a_stage_that_never_comes(tmp_path: Path) -> None:
    model = bert()
    products = Products(model.bert.encoder.layer[0].intermediate.dense)
    trainer(tmp_path, model, TransformersDualStage(POLICY, share=1.0, module="bert.encoder")).train()
    assert products.underflows == [False] * STEPS
    assert is_final(model.bert.encoder) and policy_of(model) is None


# Lightning


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.last(self.first(x).relu()), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> torch.utils.data.DataLoader:
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)


def fit(folder: Path, module: Module, callback: Any, path: str | None = None, **arguments: Any) -> Any:
    saver = lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "logger": False,
        "callbacks": [callback, saver],
    }
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    made = lightning.Trainer(**(settings | arguments))
    made.fit(module, loader(), ckpt_path=path)
    return made


@pytest.mark.parametrize(("when", "from_step"), [({"share": 0.5}, 3), ({"step": 4}, 4), ({"epoch": 1}, 3)])
def test_lightning_trainer_changes_stage(tmp_path: Path, when: dict[str, Any], from_step: int) -> None:
    module = Module()
    products = Products(module.first)
    fit(tmp_path, module, LightningDualStage(POLICY, **when))
    assert products.underflows == [step >= from_step for step in range(STEPS)]
    assert is_final(module)


def test_lightning_trainer_resumes_in_the_stage_of_its_step(tmp_path: Path) -> None:
    whole = Module()
    fit(tmp_path, whole, LightningDualStage(POLICY, step=4))
    for checkpoint, stages in ((2, [False, False, True, True]), (3, [False, True, True]), (5, [True])):
        module = Module()
        products = Products(module.first)
        fit(tmp_path / "again", module, LightningDualStage(POLICY, step=4), str(tmp_path / f"step={checkpoint}.ckpt"))
        assert products.underflows == stages and is_final(module)
        if checkpoint == 3:  # an epoch's end; in the middle of one, Lightning begins its batches again
            assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), module.parameters(), strict=True))


def test_lightning_accumulates_in_one_stage_and_attaches_a_part(tmp_path: Path) -> None:
    module = Module()
    products = Products(module.first)
    callback = LightningDualStage(POLICY, step=1, module="first")
    fit(tmp_path, module, callback, max_steps=2, accumulate_grad_batches=3)
    assert products.underflows == [False] * 3 + [True] * 3
    assert is_final(module.first) and policy_of(module.last) is None


def test_lightning_tests_under_the_policy_itself(tmp_path: Path) -> None:
    class Tested(Module):
        def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            assert is_final(self)
            self.log("loss", self.training_step(batch, index))

    module = Tested()
    made = lightning.Trainer(
        accelerator="cpu", logger=False, callbacks=[LightningDualStage(POLICY, step=3)], enable_progress_bar=False
    )
    made.test(module, loader(), verbose=False)
    assert is_final(module)


def test_an_endless_run_has_no_share(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a share of the steps needs their number, .* give step or epoch"):
        fit(tmp_path, Module(), LightningDualStage(POLICY, share=0.5), max_steps=-1, max_epochs=-1)


# Both


@pytest.mark.parametrize("make", [TransformersDualStage, LightningDualStage])
def test_when_the_second_stage_begins_is_said_once(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="give one of share, step and epoch, got none"):
        make(POLICY)
    with pytest.raises(ValueError, match="give one of share, step and epoch, got step, epoch"):
        make(POLICY, step=3, epoch=1)
    with pytest.raises(ValueError, match=r"share must be from 0 to 1, got 1\.5"):
        make(POLICY, share=1.5)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        make(POLICY, step=-1)


def test_one_definition_of_the_stages() -> None:
    stage, switch = Stage(1, 1e-3, underflow_from=0.3), Switch(share=0.3)
    assert [stage.underflows(n, 10) for n in range(10)] == [switch.is_on(n, 10, 0.0) for n in range(10)]
    model = nn.Linear(4, 4)
    dual = DualStage(model, POLICY, switch)
    for step, underflow in ((0, False), (9, True), (2, False)):
        dual.place(step, 10, 0.0)
        assert policy_of(model) == (POLICY if underflow else POLICY.replace(underflow=False))
