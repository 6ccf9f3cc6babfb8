"""NanoGPT: GPT-2's decoder with a vocabulary that may be padded, and GPT-2 weights of Hugging Face in and out.

`GPT.forward` ends at the hidden states: the head belongs to the loss (`ops/linear_logprob.py`), so that no logits of a whole
batch are ever alive. Saved as `model.safetensors` (the tied head once) with `model.json` beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lldfast.backends import require
from lldfast.data.tokenizer import Tokenizer
from lldfast.errors import CorruptError, InputError
from lldfast.files import atomic_path, read_json, write_json
from lldfast.models.pretrained import load_pretrained, problems
from lldfast.models.wrappers import plain_name, plain_names, unwrap
from lldfast.ops.linear_logprob import linear_cross_entropy

FORMAT = "lldfast-gpt"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT; nanoGPT's names. Ids from `valid_vocab` on are padding: never predicted, never counted in the loss."""

    vocab_size: int = 50304
    valid_vocab: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "valid_vocab", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"GPTConfig.{name} must be a positive integer, not {value!r}")
        if self.n_embd % self.n_head:
            raise InputError(f"GPTConfig: n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.valid_vocab > self.vocab_size:
            raise InputError(f"GPTConfig: valid_vocab={self.valid_vocab} is more than vocab_size={self.vocab_size}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"GPTConfig.dropout must be in [0, 1), not {self.dropout}")


def _small(n_layer: int, n_head: int, n_embd: int, block_size: int = 128) -> GPTConfig:
    return GPTConfig(1024, 1024, block_size, n_layer, n_head, n_embd)


PRESETS = {
    "nano-124m": GPTConfig(),
    # The demo sizes (parameters with a vocabulary of 1024) train in minutes on two CPU cores.
    "demo-330k": _small(2, 3, 96),
    "demo-1m": _small(4, 4, 128, block_size=256),
    "demo-4m": _small(6, 6, 216, block_size=256),
    "test-tiny": GPTConfig(257, 257, 64, 2, 2, 32),
}


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)); causal, GELU in its tanh form as in GPT-2."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.ln_1 = nn.LayerNorm(d, bias=config.bias)
        self.qkv = nn.Linear(d, 3 * d, bias=config.bias)
        self.proj = nn.Linear(d, d, bias=config.bias)
        self.ln_2 = nn.LayerNorm(d, bias=config.bias)
        self.up = nn.Linear(d, 4 * d, bias=config.bias)
        self.down = nn.Linear(4 * d, d, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, d = x.shape
        p = self.dropout if self.training else 0.0
        qkv = self.qkv(self.ln_1(x)).view(batch, time, 3, self.n_head, d // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, n_head, T, d / n_head]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        y = self.proj(y.transpose(1, 2).reshape(batch, time, d))
        x = x + (F.dropout(y, p) if p else y)
        y = self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))
        return x + (F.dropout(y, p) if p else y)


class GPT(nn.Module):
    """GPT-2 with learned positions and a head tied to the token embedding.

    Args:
        config: GPTConfig or the name of a preset.
        seed: seed of the initial weights (nanoGPT's: normal, sd 0.02, residual projections divided by sqrt(2 n_layer)); the
            global random state is left alone. None: draw a seed from the global random state.
    """

    def __init__(self, config: GPTConfig | str = "nano-124m", *, seed: int | None = None) -> None:
        super().__init__()
        if isinstance(config, str):
            if config not in PRESETS:
                raise InputError(f"unknown GPT preset {config!r}; there are {', '.join(PRESETS)}")
            config = PRESETS[config]
        self.config = config
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        # Made without values and filled once below; the modules' own init draws from the global random state even on "meta".
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.to_empty(device="cpu")
        self._init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator) -> None:
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                residual = name.endswith(("proj.weight", "down.weight"))
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02, generator=generator)

    @property
    def head_weight(self) -> Tensor:
        """[V, d], tied to the token embedding; rows from valid_vocab on are padding."""
        return self.wte.weight

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def num_params(self, include_positions: bool = True) -> int:
        """Number of parameters, the tied head counted once."""
        total = sum(p.numel() for p in self.parameters())
        return total if include_positions else total - self.wpe.weight.numel()

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> hidden states after the last LayerNorm [B, T, d].

        Raises:
            InputError: T is more than block_size.
        """
        time = ids.shape[1]
        if time > self.config.block_size:
            raise InputError(f"{time} tokens do not fit a block_size of {self.config.block_size}")
        x = self.wte(ids) + self.wpe.weight[:time]
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x)

    def logits(self, ids: Tensor) -> Tensor:
        """[B, T, valid_vocab], for looking and testing; losses and scores take `forward` and `head_weight` instead."""
        return self.forward(ids) @ self.head_weight[: self.config.valid_vocab].T

    @overload
    def loss(self, x: Tensor, y: Tensor, *, return_logprob: Literal[False] = False) -> Tensor: ...
    @overload
    def loss(self, x: Tensor, y: Tensor, *, return_logprob: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def loss(self, x: Tensor, y: Tensor, *, return_logprob: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Mean cross entropy in nats of labels y [B, T] (-100: ignored) given x [B, T]; on request also logprob [B, T]."""
        options: dict[str, Any] = {"valid_vocab": self.config.valid_vocab, "return_logprob": return_logprob}
        return linear_cross_entropy(self(x), self.head_weight, y, **options)

    def save(
        self,
        folder: str | os.PathLike[str],
        tokenizer_describe: Mapping[str, Any] | Tokenizer | None = None,
        extra: Mapping[str, Any] | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    ) -> None:
        """Write model.safetensors, then model.json, each atomically; a Tokenizer given as such is saved beside them.

        Args:
            tokenizer_describe: a Tokenizer, or what its describe() gives.
            extra: JSON-able facts to keep with the model (name, licence, domain_weights, ...).
            dtype: storage type; `load` always gives fp32.
        """
        from safetensors.torch import save_file

        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
        folder = Path(folder)
        state = {plain_name(name): p.detach().to("cpu", DTYPES[dtype]).contiguous() for name, p in self.state_dict().items()}
        bad = [name for name, p in state.items() if not bool(torch.isfinite(p).all())]
        if bad:
            raise InputError(f"{folder}: {bad[0]} has values that are not finite in {dtype}")
        with atomic_path(folder / "model.safetensors") as temporary:
            save_file(state, temporary, metadata={"format": FORMAT})
            digest = _sha256(temporary)
        if isinstance(tokenizer_describe, Tokenizer):
            tokenizer_describe.save(folder)
            tokenizer_describe = tokenizer_describe.describe()
        # Written last: it carries the hash of the weights, so that a kill between the two files is noticed by load.
        write_json(
            folder / "model.json",
            {
                "format": FORMAT,
                "version": 1,
                "config": dataclasses.asdict(self.config),
                "dtype": dtype,
                "parameters": self.num_params(),
                "sha256": digest,
                "tokenizer": None if tokenizer_describe is None else dict(tokenizer_describe),
                "extra": dict(extra or {}),
            },
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> GPT:
        """Read what `save` wrote, on the CPU, in fp32 and evaluation mode.

        Raises:
            InputError: there is no model.json or it is of another format.
            CorruptError: the weights do not fit it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        about = read_gpt_json(folder)
        file = folder / "model.safetensors"
        if not file.is_file():
            raise CorruptError(f"{file} is missing")
        if _sha256(file) != about["sha256"]:
            raise CorruptError(f"{file} is not the file that model.json describes (SHA-256 differs)")
        try:
            state = load_file(file)
        except SafetensorError as error:
            raise CorruptError(f"{file}: weights and model.json do not fit: it is no safetensors file ({error})") from None
        try:
            model = cls(GPTConfig(**about["config"]), seed=0)
        except (TypeError, InputError) as error:
            raise CorruptError(f"{folder / 'model.json'}: its config is none of a GPT ({error})") from None
        own = model.state_dict()
        names = plain_names(state, own)
        state = {names[name]: value for name, value in state.items()}
        shapes = [(n, v.shape, own[n].shape) for n, v in state.items() if n in own and v.shape != own[n].shape]
        faults = problems({"missing_keys": own.keys() - state, "unexpected_keys": state.keys() - own, "mismatched_keys": shapes})
        faults += [f"the weight {n} is of {v.dtype}" for n, v in state.items() if not v.is_floating_point()]
        if faults:
            raise CorruptError(f"{file}: weights and model.json do not fit: {'; '.join(faults)}")
        changed = next((name for name, plain in names.items() if name != plain), None)
        if changed is not None:
            warnings.warn(f"{file}: weights are named as a wrapper names them ({changed}); read without, all fit", stacklevel=2)
        model.load_state_dict(state)
        return model.eval()

    @classmethod
    def from_hf(cls, source: Any, *, multiple: int = 64, dropout: float = 0.0) -> GPT:
        """GPT from a Hugging Face GPT-2: a GPT2LMHeadModel, its folder, or a hub id; in fp32.

        The vocabulary is padded to a `multiple` with zero rows.

        Raises:
            InputError: not a GPT-2, a variant that this class does not compute, or a folder whose weights do not fit it.
            CorruptError: a file of the folder is truncated.
            MissingDependencyError: transformers is not installed and `source` is not a model.
        """
        hf = source
        if isinstance(source, (str, os.PathLike)):
            hf = load_pretrained(os.fspath(source), torch.float32)
        elif isinstance(source, nn.Module):
            hf = unwrap(source)
        c: Any = getattr(hf, "config", None)
        if getattr(c, "model_type", None) != "gpt2" or not hasattr(hf, "transformer"):
            raise InputError(f"from_hf needs a GPT2LMHeadModel, not {type(hf).__name__}")
        expected: dict[str, tuple[Any, ...]] = {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "n_inner": (None, 4 * c.n_embd),
            "tie_word_embeddings": (True,),
            "add_cross_attention": (False,),
        }
        for name, allowed in expected.items():
            if getattr(c, name, allowed[0]) not in allowed:
                raise InputError(f"from_hf: this GPT-2 has {name}={getattr(c, name)!r}; supported: {allowed}")
        padded = -(-c.vocab_size // multiple) * multiple
        config = GPTConfig(padded, c.vocab_size, c.n_positions, c.n_layer, c.n_head, c.n_embd, dropout, True)
        model = cls(config, seed=0)
        theirs = hf.state_dict()
        # Two matrices that differ stay apart in transformers, whatever the configuration says.
        if not torch.equal(theirs["lm_head.weight"], theirs["transformer.wte.weight"]):
            raise InputError("from_hf: this GPT-2 has a head of its own, not tied to its token embedding")
        with torch.no_grad():
            for name, p in model.named_parameters():
                value = theirs[_hf_name(name)]
                value = value.T if _is_conv1d(name) else value
                p.zero_()
                p[: len(value)] = value.to("cpu", torch.float32)
        return model.eval()

    def to_hf(self) -> Any:
        """A GPT2LMHeadModel with the same weights (biases of zero where this model has none), without the padding rows.

        Raises:
            MissingDependencyError: transformers is not installed.
        """
        transformers = require("transformers", "GPT-2 conversion needs")
        c = self.config
        config = transformers.GPT2Config(
            vocab_size=c.valid_vocab, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        # transformers draws initial values from the global RNG; they are overwritten, and the RNG must not notice.
        with torch.random.fork_rng(devices=[]):
            model = transformers.GPT2LMHeadModel(config)
        state = {name: torch.zeros_like(p) for name, p in model.state_dict().items() if name.endswith(".bias")}
        for name, p in self.named_parameters():
            value = p.detach().to("cpu", torch.float32)
            value = value[: c.valid_vocab] if name == "wte.weight" else value
            state[_hf_name(name)] = (value.T if _is_conv1d(name) else value).contiguous()
        state["lm_head.weight"] = state["transformer.wte.weight"]
        model.load_state_dict(state)
        return model.eval()


def read_gpt_json(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The model.json of a folder that `GPT.save` wrote.

    Raises:
        InputError: it is missing or of another format.
        CorruptError: a field is missing.
    """
    about = read_json(Path(folder) / "model.json")
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != 1:
        raise InputError(f"{Path(folder) / 'model.json'} is not a version 1 {FORMAT} file")
    fields: dict[str, tuple[type, ...]] = {
        "config": (dict,), "sha256": (str,), "tokenizer": (dict, type(None)), "extra": (dict, type(None)),
    }  # fmt: skip
    for key, kinds in fields.items():
        if not isinstance(about.get(key), kinds):
            raise CorruptError(f"{Path(folder) / 'model.json'}: field {key!r} is missing or of a wrong type")
    return about


def _hf_name(name: str) -> str:
    """Our parameter name -> GPT2LMHeadModel's."""
    parts = {"qkv": "attn.c_attn", "proj": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "blocks": "h"}
    return "transformer." + ".".join(parts.get(part, part) for part in name.split("."))


def _is_conv1d(name: str) -> bool:
    """GPT-2 keeps these weights transposed, [in, out]."""
    return name.endswith(("qkv.weight", "proj.weight", "up.weight", "down.weight"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_chunks(file)


def _sha256_chunks(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
