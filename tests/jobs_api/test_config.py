"""From OpenAI's body to the configuration of a job: what lands where, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon.errors import InvalidArgument
from trilithon_finetune.api.convert import config_document, job_config
from trilithon_finetune.config import JobConfig, parse_config
from trilithon_finetune.errors import FinetuneError
from trilithon_server.config import LimitsConfig

LIMITS = LimitsConfig()
BASE = {"model": "tiny", "training_file": "file-1"}


def made(**body: Any) -> JobConfig:
    return job_config({**BASE, **body}, LIMITS)


def test_everything_of_openais_shape_has_its_place() -> None:
    """Each field of the body lands in its field of the configuration; `auto` leaves the choice open."""
    config = made(
        validation_file="file-2",
        suffix="faq",
        seed=0,
        metadata={"a": "b"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}},
        },
        trilithon={"task": "lm", "tuning": {"rank": 4, "targets": ["q_proj"]}, "priority": -2},
    )

    assert (config.validation_file, config.suffix, config.seed, config.metadata) == ("file-2", "faq", 0, {"a": "b"})
    assert (config.training.epochs, config.training.batch_size) == (2, None)
    assert config.optimizer.lr == pytest.approx(1e-4)
    assert (config.task, config.tuning.rank, config.tuning.targets, config.priority) == ("lm", 4, ("q_proj",), -2)


@pytest.mark.parametrize(
    ("inner", "rate"),
    [({}, 4e-4), ({"tuning": {"kind": "full"}}, 4e-5), ({"task": "ner"}, 4e-5), ({"tuning": {"kind": "lora"}}, 4e-4)],
)
def test_the_multiplier_is_of_the_published_rate(inner: dict[str, Any], rate: float) -> None:
    """`learning_rate_multiplier` m resolves to m times the rate of what is trained."""
    config = made(hyperparameters={"learning_rate_multiplier": 2}, trilithon=inner)

    assert config.optimizer.lr == pytest.approx(rate)


def test_dpo_sets_its_task_and_beta() -> None:
    """The method `dpo` is the task `dpo`, and its beta an option of the task."""
    config = made(method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}})

    assert (config.task, config.options, config.training.epochs) == ("dpo", {"beta": 0.2}, 1)


@pytest.mark.parametrize(
    ("body", "field", "code"),
    [
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "method.type", "unsupported_method"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "unsupported_parameter"),
        ({"modle": "x"}, "modle", "unknown_parameter"),
        ({"suffix": "No Good"}, "suffix", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"metadata": {"k" * 65: "v"}}, "trilithon", "invalid_value"),
        ({"trilithon": {"tunning": {}}}, "trilithon.tunning", "unknown_parameter"),
        ({"trilithon": {"tuning": {"rnak": 3}}}, "trilithon.tuning.rnak", "unknown_parameter"),
        ({"trilithon": {"tuning": {"rank": 0}}}, "trilithon.tuning.rank", "invalid_value"),
        ({"trilithon": {"tuning": {"rank": "8"}}}, "trilithon.tuning.rank", "invalid_value"),
        ({"trilithon": {"task": "poetry"}}, "trilithon.task", "invalid_value"),
        ({"trilithon": {"model": "y"}}, "trilithon.model", "unknown_parameter"),
        ({"trilithon": {"optimizer": {"lr": 1e-4}}, "hyperparameters": {"learning_rate_multiplier": 1}},
         "hyperparameters.learning_rate_multiplier", "invalid_value"),
        ({"trilithon": {"training": {"epochs": 1}}, "hyperparameters": {"n_epochs": 1}}, "hyperparameters.n_epochs",
         "invalid_value"),
        ({"hyperparameters": {}, "method": {"type": "supervised", "supervised": {"hyperparameters": {}}}},
         "hyperparameters", "invalid_value"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "invalid_value"),
        ({"method": {"type": "dpo"}, "trilithon": {"task": "sft"}}, "trilithon.task", "invalid_value"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "invalid_value"),
    ],
)  # fmt: skip
def test_R11_what_breaks_a_rule_is_named(body: dict[str, Any], field: str, code: str) -> None:
    """Each broken rule has its field, its code and a sentence."""
    with pytest.raises(InvalidArgument) as caught:
        made(**body)

    violation = caught.value.details[0]
    assert (violation.field, violation.code) == (field, code), violation
    assert violation.message.endswith((".", "?", '"'))


def test_integrations_are_those_that_there_are() -> None:
    """TensorBoard is written for, over both protocols; W&B is refused with what to do, anything else by its name."""
    config = made(integrations=[{"type": "tensorboard"}])
    document = config_document(
        model="tiny", training_file="file-1", validation_file="", suffix="", seed=None, metadata={}, task="",
        config_json='{"integrations": [{"type": "tensorboard"}]}', priority=0,
    )  # fmt: skip

    assert [item.type for item in config.integrations] == ["tensorboard"]
    assert job_config(document, LIMITS).integrations == config.integrations
    with pytest.raises(InvalidArgument, match="`wandb sync` reads"):
        made(integrations=[{"type": "wandb", "wandb": {"project": "x"}}])
    with pytest.raises(InvalidArgument) as unknown:
        made(integrations=[{"type": "mlflow"}])
    assert unknown.value.details[0].field == "integrations.0.type"
    with pytest.raises(FinetuneError, match="wandb sync"):
        parse_config({"model": "m", "training_file": "f", "integrations": [{"type": "wandb"}]})


def test_R11_every_broken_rule_is_told() -> None:
    """Three mistakes in three places come back together."""
    with pytest.raises(InvalidArgument) as caught:
        made(
            method={"type": "reinforcement"},
            integrations=[{"type": "wandb"}],
            trilithon={"tuning": {"rank": 999}, "data": {"max_tokenz": 3}},
        )

    fields = [item.field for item in caught.value.details]
    assert fields == ["method.type", "integrations", "trilithon.tuning.rank", "trilithon.data.max_tokenz"]
    assert 'Did you mean "max_tokens"?' in caught.value.details[3].message


def test_both_protocols_mean_the_same_configuration() -> None:
    """The fields of `CreateJobRequest` give the configuration that the HTTP body gives."""
    body = made(suffix="a", seed=3, trilithon={"task": "lm", "tuning": {"rank": 4}, "priority": 5})
    document = config_document(
        model="tiny", training_file="file-1", validation_file="", suffix="a", seed=3, metadata={}, task="lm",
        config_json='{"tuning": {"rank": 4}}', priority=5,
    )  # fmt: skip

    assert job_config(document, LIMITS) == body
    with pytest.raises(InvalidArgument, match="config_json"):
        config_document(
            model="tiny", training_file="f", validation_file="", suffix="", seed=None, metadata={}, task="lm",
            config_json='{"task": "sft"}', priority=0,
        )  # fmt: skip
    with pytest.raises(InvalidArgument, match="config_json"):
        config_document(
            model="tiny", training_file="f", validation_file="", suffix="", seed=None, metadata={}, task="",
            config_json="[1]", priority=0,
        )  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["model", "training_file", "seed", "suffix", "metadata", "method", "hyperparameters", "integrations", "trilithon"]
)
INNER = st.sampled_from(
    ["task", "tuning", "optimizer", "training", "data", "options", "deploy", "limits", "model", "x"]
)


@settings(deadline=None, max_examples=300)
@given(outer=st.dictionaries(KEYS, JSON, max_size=5), inner=st.dictionaries(INNER, JSON, max_size=4) | st.none())
def test_S9_any_body_is_a_configuration_or_a_refusal(outer: dict[str, Any], inner: dict[str, Any] | None) -> None:
    """No JSON body raises anything but InvalidArgument with details, and a configuration that is made is whole."""
    body = {**BASE, **outer, **({} if inner is None else {"trilithon": inner})}

    refused: InvalidArgument | None = None
    config: JobConfig | None = None
    try:
        config = job_config(body, LIMITS)
    except InvalidArgument as error:
        refused = error

    if config is None:
        assert refused is not None
        assert refused.details
    else:
        assert JobConfig.model_validate(config.model_dump()) == config
