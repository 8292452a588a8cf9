"""Loading checkpoints, and the two parts of a causal language model this suite works with: backbone and LM head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from gift.cli import UserError
from gift.vocab.head import LogitMap

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}


def quiet_transformers() -> None:
    """Keeps transformers' progress bars and warnings out of a command's output; its errors pass."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def device() -> torch.device:
    """Where models compute: this process's current GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def is_local(name: str | Path) -> bool:
    """Whether a model name means a folder on this machine rather than a Hub repository."""
    text = str(name)
    return Path(text).exists() or text.startswith((".", "/", "~")) or text.count("/") > 1


def check_checkpoint(path: Path) -> None:
    """Raises UserError, naming what is missing, unless `path` is a folder with a config and safetensors weights."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json in this folder; give a Hugging Face checkpoint")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path}: no *.safetensors in this folder; a checkpoint without weights cannot be loaded")


def download(name: str, revision: str | None = None) -> Path:
    """The local folder of a Hub repository's config, tokenizer and safetensors. Raises UserError with the reason."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub's client raises a dozen unrelated kinds
        raise UserError(
            f"{name}: no such folder, and not to be had from the Hub ({first_line(error)});"
            " give a checkpoint folder or a Hub id"
        ) from error


def load_model(
    name: str | Path, *, dtype: str = "float32", revision: str | None = None, attention: str | None = None
) -> PreTrainedModel:
    """A causal LM in evaluation mode from a checkpoint folder or a Hub repository.

    `attention` names transformers' implementation; None leaves the choice to it. Only safetensors are read and no code
    from the checkpoint is run. Raises UserError naming the checkpoint and the reason, also where the implementation is
    not to be had, or a weight is missing: transformers would make it up.
    """
    if is_local(name):
        check_checkpoint(Path(name))
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            str(name),
            dtype=DTYPES[dtype],
            revision=revision,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and the Hub raise a dozen unrelated kinds here
        raise UserError(f"{name}: cannot load this model: {first_line(error)}") from error
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{name}: not a causal language model")
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"{name}: {len(missing)} weights are missing from this checkpoint, among them {missing[0]}")
    if attention != "flash_attention_2":  # which needs a GPU; evaluation loads the same checkpoint without it
        check_logits(model.eval(), str(name))
    return model.eval()


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. Raises UserError if it is missing or has no end token."""
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"{name}: no such checkpoint folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), revision=revision, trust_remote_code=False)
    except Exception as error:  # same as above
        raise UserError(f"{name}: cannot load this tokenizer: {first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without tokenizer.json
        raise UserError(f"{name}: this checkpoint has no tokenizer; add its tokenizer.json and tokenizer_config.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: this tokenizer has no end token (eos_token), so no response could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str | Path, *, revision: str | None = None) -> Any:
    """The model configuration of a checkpoint folder or Hub repository. Raises UserError if it cannot be read."""
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"{name}: no such checkpoint folder")
    try:
        return AutoConfig.from_pretrained(str(name), revision=revision, trust_remote_code=False)
    except Exception as error:  # same as above
        raise UserError(f"{name}: cannot read this model's config: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """An exception's first line, for a one-line message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder without its LM head: its `last_hidden_state` is the post-final-norm state."""
    decoder = model.get_decoder()
    assert isinstance(decoder, torch.nn.Module)
    return decoder


def lm_head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The LM head's weight [V, H] and bias [V] or None."""
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


def logit_map(model: PreTrainedModel) -> dict[str, Any]:
    """What the model does to its head's product, as arguments of gift.vocab: `scale`, `softcap` or nothing.

    Cohere multiplies by logit_scale, Granite divides by logits_scaling, Gemma caps at final_logit_softcapping. That
    nothing else happens is what `check_logits` makes sure of.
    """
    config = model.config.get_text_config()
    found: dict[str, Any] = {}
    if scale := getattr(config, "logit_scale", None):
        found["scale"] = float(scale)
    if divisor := getattr(config, "logits_scaling", None):
        found["scale"] = 1 / float(divisor)
    if softcap := getattr(config, "final_logit_softcapping", None):
        found["softcap"] = float(softcap)
    return found


@torch.no_grad()
def check_logits(model: PreTrainedModel, name: str) -> None:
    """Raises UserError unless backbone, head and `logit_map` together give the logits of the model itself.

    Every loss, sample and distance of this suite is computed from these three parts.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 9, device=model.device).remainder(rows).unsqueeze(0)
    own = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), -1)
    weight, bias = lm_head(model)
    states = states_at(model, ids, None, torch.ones_like(ids, dtype=torch.bool))
    if not states.isfinite().all():
        raise UserError(f"{name}: the model's states are not finite; its weights are damaged")
    product = nn.functional.linear(states, weight, bias)
    ours = torch.log_softmax(LogitMap(**logit_map(model)).apply(product.float()), -1)
    tolerance = 0.1 if model.dtype == torch.bfloat16 else 1e-3
    if ours.shape != own.shape or not (ours - own).abs().max() <= tolerance * max(1.0, float(own.abs().max())):
        raise UserError(
            f"{name}: {type(model).__name__} does something to its logits that this suite does not know; it would be"
            " trained and measured wrongly"
        )


def end_ids(model: PreTrainedModel) -> list[int]:
    """The token ids at which generation ends: those of the generation config, else of the model's config."""
    return as_ids(model.generation_config, model.config)


def stored_end_ids(checkpoint: Path) -> list[int]:
    """As `end_ids`, from a checkpoint folder's two files alone."""
    file = checkpoint / "generation_config.json"
    return as_ids(GenerationConfig.from_pretrained(checkpoint) if file.is_file() else None, load_config(checkpoint))


def as_ids(generation: GenerationConfig | None, config: Any) -> list[int]:
    """The end tokens of a generation config, else of a model's config."""
    ends = None if generation is None else generation.eos_token_id
    ends = config.eos_token_id if ends is None else ends
    return [ends] if isinstance(ends, int) else list(ends or [])


def states_at(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    selected: Tensor,
    *,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Post-final-norm states [N, H] at the N positions where `selected` [B, T] is true, in row-major order.

    A packed row, [1, T], comes with `position_ids` [1, T] that start at 0 with each sequence, and without a mask: only
    then, and only without a key-value cache, does transformers keep the sequences' attention apart (block-diagonal
    masks in masking_utils.py, or flash attention's variable lengths, which take one row at a time).
    """
    states: Tensor = backbone(model)(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    return states[selected]


def on_device(batch: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """The batch, of tensors or what can be moved like one, where the model is."""
    return {name: tensor.to(model.device) for name, tensor in batch.items()}
