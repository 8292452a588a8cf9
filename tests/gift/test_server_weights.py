"""How RL's weights reach a vLLM server, and how weights that are not the last ones sent are noticed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stub_server import Stub, WeightServer, line_of, one_sample, settings
from tiny_models import tiny_model

from gift.cli import UserError
from gift.generation import GenerationError, Request, SamplingParams, StaleWeightsError
from gift.generation.server import ServerEngine
from gift.lora import add_adapters
from gift.recipe import LoRA


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def weights(stub) -> WeightServer:
    return WeightServer(stub)


@pytest.fixture
def engine(stub, weights, tmp_path) -> ServerEngine:
    return ServerEngine(settings(stub.url, shared_folder=str(tmp_path)), None)


@pytest.mark.parametrize("tied", [True, False])
def test_the_server_is_given_every_weight_a_tied_head_too(engine, weights, tied):
    model = tiny_model(40, tie_word_embeddings=tied)
    engine.update_weights(model)
    assert weights.state.keys() == model.state_dict().keys()
    assert "lm_head.weight" in weights.state
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.state[name], tensor)
    assert engine.generate([Request((3,), 0)], SamplingParams(4))[0].token_ids == [4]


def test_adapters_go_merged(engine, weights):
    model = tiny_model(40)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapters(model, LoRA(rank=2, targets=("q_proj",)), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    engine.update_weights(model)
    assert weights.state.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], weights.state[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}


def test_the_shared_folder_holds_the_last_weights_alone_and_none_in_the_end(engine, weights, tmp_path):
    (tmp_path / "notes.txt").touch()
    for seed in range(3):
        engine.update_weights(tiny_model(40, seed=seed))
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "notes.txt", weights.folders[-1]])
    assert len(set(weights.folders)) == 3
    engine.close()
    engine.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "notes.txt"]


def test_a_restarted_server_has_stale_weights(engine, weights):
    engine.update_weights(tiny_model(40))
    weights.version = "default"
    for ask in (lambda: engine.generate([Request((3,), 0)], SamplingParams(4)), lambda: engine.score([(1, 2)])):
        with pytest.raises(StaleWeightsError, match="not those of this run's last update"):
            ask()


def test_a_restart_in_the_middle_is_noticed_when_a_request_is_tried_again(engine, weights, stub):
    engine.update_weights(tiny_model(40))

    def restart(_: Any) -> None:
        weights.version = "default"

    stub.replies["/v1/completions"] = restart
    with pytest.raises(StaleWeightsError):
        engine.generate([Request((3,), 0)], SamplingParams(4))
    assert len(stub.bodies()) == 1


def test_a_server_restarted_without_development_mode_has_stale_weights(engine, weights, stub):
    engine.update_weights(tiny_model(40))
    stub.replies["/weight_info"] = lambda _: (404, {"detail": "Not Found"})
    with pytest.raises(StaleWeightsError):
        engine.score([(1, 2)])


def test_weights_that_another_run_left_are_noticed(stub, weights):
    weights.version = "of another run"
    with pytest.raises(StaleWeightsError, match="those of its start"):
        one_sample(stub)


@pytest.mark.parametrize(
    ("path", "reply", "says"),
    [
        ("/collective_rpc", (500, {"error": {"message": "Worker failed"}}), "Worker failed"),
        ("/collective_rpc", {"results": []}, "did not succeed"),
        ("/collective_rpc", {"results": ["no"]}, "did not succeed"),
        ("/reset_prefix_cache?reset_running_requests=true", {"success": False}, "reset_prefix_cache did not succeed"),
        ("/update_weight_version", {}, "did not succeed"),
    ],
)
def test_weights_that_did_not_arrive_are_an_error_and_stale(engine, weights, stub, tmp_path, path, reply, says):
    stub.replies[path] = lambda _: reply
    with pytest.raises(GenerationError, match=says) as error:
        engine.update_weights(tiny_model(40))
    line_of(error, stub.url)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StaleWeightsError):
        engine.generate([Request((3,), 0)], SamplingParams(4))


def test_a_server_without_development_mode(engine, weights, stub):
    stub.replies["/collective_rpc"] = lambda _: (404, {"detail": "Not Found"})
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        engine.update_weights(tiny_model(40))


@pytest.mark.parametrize("folder", [None, "/no/such/folder"])
def test_a_shared_folder_that_is_none(stub, folder):
    engine = ServerEngine(settings(stub.url, shared_folder=folder), None)
    with pytest.raises(UserError, match=r"generation\.shared_folder"):
        engine.update_weights(tiny_model(40))
