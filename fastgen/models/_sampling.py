"""Generation: prompts of any form to rows, the rows' way through the loop, and back."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from fastgen import _validate, reference
from fastgen._dtypes import dtype_name
from fastgen.models._pretrained import read_tensors, write_tensors
from fastgen.reference.generate import Status
from fastgen.tokenizers import Tokenizer

if TYPE_CHECKING:
    from fastgen.models._text import TextModel
    from fastgen.models.rnn import RNN

__all__ = [
    "IGNORED",
    "STEPS_A_CALL",
    "Generation",
    "GenerationState",
    "RecurrentRows",
    "RowState",
    "Sampling",
    "Seed",
    "Stop",
    "TokenRows",
    "generate_tokens",
    "generate_values",
]

IGNORED = -100
"""Stands where a row has no token, in a result and in a stream: what a loss ignores."""

_UINT64 = 1 << 64
_MOST = (1 << 63) - 1  # what an int of an op holds
STEPS_A_CALL = 64  # between two of them a Ctrl-C is noticed

LogitsProcessor: TypeAlias = Callable[[list[Tensor], Tensor], Tensor]
Seed: TypeAlias = "int | Sequence[int] | None"
Stop: TypeAlias = "int | str | Sequence[int | str] | None"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token or a value is drawn; see `fastgen.reference.generate.pick_tokens`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def checked(
        cls,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        repetition_penalty: float,
    ) -> Sampling:
        return cls(
            _validate.number("temperature", temperature, minimum=0),
            0 if top_k is None else min(_validate.integer("top_k", top_k, 1), _MOST),
            1.0 if top_p is None else _share("top_p", top_p, "above 0 and at most 1"),
            0.0 if min_p is None else _share("min_p", min_p, "from 0 to 1"),
            _validate.number("repetition_penalty", repetition_penalty, above=0),
        )


def _share(name: str, value: float, limits: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1 or (value == 0 and "above 0" in limits):
        raise ValueError(f"{name}: expected a number {limits}, got {value!r}")
    return float(value)


@dataclasses.dataclass
class RowState:
    """Where n rows stand, as far as all models have it; see `GenerationState`."""

    pending: Tensor
    position: Tensor
    seeds: Tensor
    seen: Tensor | None

    def __len__(self) -> int:
        """n, the rows."""
        return len(self.pending)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as a safetensors file; whole or not at all."""
        write_tensors(Path(path), {name: x for name, x in vars(self).items() if x is not None})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """What `save` wrote.

        Raises:
            FileNotFoundError, ValueError: for a missing file, or one that holds no state of this kind.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        tensors = read_tensors(path, torch.device(device))
        fields = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        optional = {name for name, kind in fields.items() if "None" in kind}
        if not fields.keys() - optional <= tensors.keys() <= fields.keys():
            raise ValueError(f"{path}: not the state of a generation (it holds {', '.join(sorted(tensors))})")
        return cls(**{name: tensors.get(name) for name in fields})  # type: ignore[arg-type]


@dataclasses.dataclass
class GenerationState(RowState):
    """Where n rows of a recurrent model stand: what `RNN.generate(..., state=)` continues.

    Attributes:
        h, c: (num_layers, n, hidden_size), the states of the layers; c for LSTM, else None.
        pending: the last token (n,) int64, or values (n, input_size), which the layers have not seen yet.
        position: (n,) int64, how many tokens or values come before it.
        seeds: (n,) int64, the bit patterns of the rows' seeds.
        seen: (n, vocab_size) bool, the tokens of the row so far; None for values.
    """

    h: Tensor
    c: Tensor | None


class Generation(Iterator[Any]):
    """Tokens or values as they come; what `generate(..., stream=True)` gives.

    A step gives, by the form of the prompt: for one string, a piece of text; for several, a list of them,
    where "" stands for nothing new; for tokens (L,) an int; for several rows int64 (n,), where -100 stands
    for no token; for values (T, F) or (n, T, F) the next ones, (F,) or (n, F).

    Attributes:
        result: all that has been generated so far, behind the prompt.
        state: where the rows stand, at any time.
    """

    def __init__(self, steps: Iterator[Any], result: Callable[[], Any], state: Callable[[], Any]) -> None:
        self._steps, self._result, self._state = steps, result, state

    def __next__(self) -> Any:
        return next(self._steps)

    @property
    def result(self) -> Any:
        return self._result()

    @property
    def state(self) -> Any:
        return self._state()


# ---------------------------------------------------------------------------------------------------
# Tokens


def generate_tokens(
    make_rows: Callable[..., TokenRows],
    model: TextModel,
    prompt: Any,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Stop,
    seed: Seed,
    n: int,
    state: RowState | None,
    logits_processor: LogitsProcessor | None,
    one_by_one: bool,
) -> Generation:
    """A generation whose steps give one token each, or, not `one_by_one`, as many as is convenient.

    `make_rows`: the class of the rows of such a model.
    """
    prompts = _TokenPrompts(model, prompt, n, state)
    seeds = _row_seeds(seed, len(prompts.rows), state)
    rows = make_rows(model, prompts.rows, max_new_tokens, sampling, seeds, state, logits_processor)
    tokens, strings = _stops(stop, model)
    rows.stop = torch.tensor(tokens, dtype=torch.int64, device=model.device)
    if not prompts.is_text and not strings:
        return Generation(
            prompts.token_steps(rows, one_by_one), lambda: prompts.tokens_of(rows.sequences()), rows.state
        )
    assert model.tokenizer is not None
    texts = [_RowText(model.tokenizer, row.tolist(), strings) for row in rows.prompts()]

    def steps() -> Iterator[Any]:
        # A stop string is looked for after every token, so that nothing is drawn behind it.
        for new in rows.run(one_by_one or bool(strings)):
            pieces = [text.push(tokens) for text, tokens in zip(texts, new, strict=True)]
            for row, text in enumerate(texts):
                if text.stopped:
                    rows.end_row(row)
                elif rows.is_over(row):
                    pieces[row] += text.flush()
            yield prompts.pieces(pieces) if prompts.is_text else prompts.newest(new)

    def result() -> Any:
        if not prompts.is_text:
            return prompts.tokens_of(rows.sequences())
        return prompts.pieces([start + text.text for start, text in zip(prompts.texts, texts, strict=True)])

    return Generation(steps(), result, rows.state)


class _TokenPrompts:
    """The prompts as rows of tokens, and results in the form that the prompts had."""

    def __init__(self, model: TextModel, prompt: Any, n: int, state: RowState | None) -> None:
        _validate.integer("n", n, 1)
        self.texts: list[str] = []
        single = isinstance(prompt, str) or (isinstance(prompt, Tensor) and prompt.dim() == 1)
        prompts = [prompt] if single else _items(prompt)
        self.is_text = bool(prompts) and isinstance(prompts[0], str)
        self._stacked = isinstance(prompt, Tensor)
        self._single = single and n == 1
        if not prompts or not all(isinstance(item, str if self.is_text else Tensor) for item in prompts):
            raise TypeError(
                "prompt: expected a string, a tensor of tokens (L,) or (B, L), or a list of strings or of tensors "
                f"(L,), none of them empty, got {_kind(prompt)}"
            )
        if self.is_text and model.tokenizer is None:
            raise ValueError("prompt: expected tokens, as the model has no tokenizer, got a string")
        prompts = [item for item in prompts for _ in range(n)]
        self.rows = [self._tokens(model, index, item) for index, item in enumerate(prompts)]
        if self.is_text:
            self.texts = prompts
        if state is None and min(len(row) for row in self.rows) == 0:
            raise ValueError("prompt: expected at least one token where no state is continued, got an empty one")

    def _tokens(self, model: TextModel, index: int, item: str | Tensor) -> Tensor:
        if isinstance(item, str):
            assert model.tokenizer is not None
            try:
                return torch.tensor(model.tokenizer.encode(item), dtype=torch.int64, device=model.device)
            except ValueError as error:
                raise ValueError(f"prompt: {error}") from None
        if item.dtype not in (torch.int64, torch.int32) or item.dim() != 1:
            dtype = dtype_name(item.dtype)
            raise TypeError(f"prompt: expected int64 tokens (L,) a row, got {dtype} {tuple(item.shape)}")
        if item.numel() and not 0 <= int(item.min()) <= int(item.max()) < model.vocab_size:
            wrong = int(item.min()) if int(item.min()) < 0 else int(item.max())
            raise ValueError(f"prompt: expected tokens 0 to {model.vocab_size - 1}, got {wrong} in row {index}")
        return item.to(model.device, torch.int64)

    def pieces(self, pieces: list[str]) -> str | list[str]:
        return pieces[0] if self._single else pieces

    def newest(self, new: list[list[int]]) -> Any:
        last = [tokens[-1] if tokens else IGNORED for tokens in new]
        return last[0] if self._single else torch.tensor(last)

    def tokens_of(self, rows: list[Tensor]) -> Tensor | list[Tensor]:
        if self._single:
            return rows[0]
        if not self._stacked:
            return rows
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)

    def token_steps(self, rows: TokenRows, one_by_one: bool) -> Iterator[Any]:
        return (self.newest(new) for new in rows.run(one_by_one))


class TokenRows(abc.ABC):
    """Rows of tokens that grow to the right: each token is fed to the model, and behind the prompt the next drawn.

    What a kind of model adds: `state_class`, `_begin`, `_advance` and `state`.
    """

    state_class: ClassVar[type[RowState]]

    def __init__(
        self,
        model: TextModel,
        prompts: list[Tensor],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Tensor,
        state: RowState | None,
        logits_processor: LogitsProcessor | None,
    ) -> None:
        _validate.integer("max_new_tokens", max_new_tokens, 1)
        device, n = model.device, len(prompts)
        self._model: Any = model
        self._processor = logits_processor
        self._sampling, self._penalised = sampling, sampling.repetition_penalty != 1
        self._first = 0 if state is None else 1  # where the buffer begins with the state's pending token
        offset, self._seen = self._begin(n, state)
        if state is not None:
            pending = state.pending.to(device)
            for row, token in enumerate(pending.tolist()):
                if not 0 <= token < model.vocab_size:
                    raise ValueError(
                        f"state: expected pending tokens 0 to {model.vocab_size - 1}, got {token} in row {row}"
                    )
            prompts = [torch.cat((pending[row : row + 1], p)) for row, p in enumerate(prompts)]
        self._given = torch.tensor([len(p) for p in prompts], device=device)
        self._end = self._given + max_new_tokens
        self._tokens = torch.zeros(n, int(self._end.max()), dtype=torch.int64, device=device)
        for row, p in enumerate(prompts):
            self._tokens[row, : len(p)] = p
            if self._penalised:
                self._seen[row, p] = True
        self._position, self._status = (torch.zeros(n, dtype=torch.int64, device=device) for _ in range(2))
        self._seeds = torch.stack((seeds.to(device), offset), dim=-1)
        self.stop = torch.zeros(0, dtype=torch.int64, device=device)

    @abc.abstractmethod
    def _begin(self, n: int, state: Any) -> tuple[Tensor, Tensor]:
        """The place (n,) of the rows' first token in their streams, and the tokens seen (n, vocab_size)."""

    @abc.abstractmethod
    def _advance(self, running: list[int], one_by_one: bool) -> None:
        """Take the running rows some tokens further, or, `one_by_one`, until one of them has drawn a token."""

    @abc.abstractmethod
    def state(self) -> RowState:
        """Where the rows stand."""

    def run(self, one_by_one: bool) -> Iterator[list[list[int]]]:
        """Feed and draw to the end; gives the new tokens of each row, after every call that drew any."""
        lengths: list[int] = self._given.tolist()
        status = self._status.tolist()
        while running := [row for row, code in enumerate(status) if code == Status.RUNNING]:
            self._advance(running, one_by_one)
            position, status = self._position.tolist(), self._status.tolist()
            if Status.NOT_FINITE in status:
                row = status.index(Status.NOT_FINITE)
                raise ValueError(
                    f"model: its scores of token {int(self._seeds[row, 1]) + position[row]} of row {row} are NaN or "
                    "infinite; the weights are damaged, or the temperature is too small"
                )
            ends = [max(before, after + 1) for before, after in zip(lengths, position, strict=True)]
            new = [
                self._tokens[row, before:after].tolist() if after > before else []
                for row, (before, after) in enumerate(zip(lengths, ends, strict=True))
            ]
            lengths = ends
            if any(new):
                yield new
                status = self._status.tolist()  # the reader of a text may have ended a row

    def _processed(self, rows: Tensor, logits: Tensor) -> Tensor:
        assert self._processor is not None
        before = [self._tokens[row, self._first : self._position[row]] for row in rows.tolist()]
        processed = self._processor(before, logits)
        if not isinstance(processed, Tensor) or processed.shape != logits.shape:
            raise ValueError(f"logits_processor: expected logits {tuple(logits.shape)} from it, got {_kind(processed)}")
        if not processed.is_floating_point():
            raise ValueError(f"logits_processor: expected floating-point logits, got {dtype_name(processed.dtype)}")
        return processed

    def is_over(self, row: int) -> bool:
        return int(self._status[row]) != Status.RUNNING

    def end_row(self, row: int) -> None:
        self._status[row] = Status.STOPPED

    def prompts(self) -> list[Tensor]:
        """What each buffer began with, the pending token of a state included."""
        return [row[:given] for row, given in zip(self._tokens, self._given.tolist(), strict=True)]

    def sequences(self) -> list[Tensor]:
        """The prompt and the continuation of each row, so far."""
        lengths = torch.maximum(self._position + 1, self._given).tolist()
        return [row[self._first : length].clone() for row, length in zip(self._tokens, lengths, strict=True)]

    def _common_state(self) -> dict[str, Tensor]:
        """The fields of a `RowState`."""
        if bool((self._position + 1 < self._given).any()):
            raise RuntimeError("state: expected every row to have a token of its own, some still read their prompt")
        for row, tokens in enumerate(self.sequences()):
            self._seen[row, tokens] = True
        return {
            "pending": self._tokens.gather(1, self._position.unsqueeze(1)).squeeze(1),
            "position": self._seeds[:, 1] + self._position,
            "seeds": self._seeds[:, 0].clone(),
            "seen": self._seen.clone(),
        }


class RecurrentRows(TokenRows):
    """Rows of a recurrent model: the tensors of `rnn_generate`, and the weights that it works with."""

    state_class = GenerationState

    def __init__(self, model: RNN, *arguments: Any) -> None:
        super().__init__(model, *arguments)
        self._generate: Callable[..., None] = torch.ops.fastgen.rnn_generate
        if self._processor is not None:
            self._generate = functools.partial(reference.rnn_generate, process=self._processed)
        self._weights, self._options = model.generation_weights(), model.generation_options()
        self._mode = model.mode

    def _begin(self, n: int, state: GenerationState | None) -> tuple[Tensor, Tensor]:
        self._h, self._c, offset, seen = _start(self._model, n, state)
        return offset, seen

    def _advance(self, running: list[int], one_by_one: bool) -> None:
        steps = STEPS_A_CALL
        if one_by_one:
            unread = (self._given - self._position)[running]
            steps = min(max(int(unread.min()), 1), steps)
        embedding, weights, projection, output, bias = self._weights
        self._generate(
            self._mode,
            self._tokens,
            self._position,
            self._given,
            self._end,
            self._status,
            self._h,
            self._c,
            self._seen if self._penalised else None,
            embedding,
            weights,
            projection,
            output,
            bias,
            self._seeds,
            *dataclasses.astuple(self._sampling),
            self.stop,
            steps,
            *self._options,
        )

    def state(self) -> GenerationState:
        common = self._common_state()
        return GenerationState(**common, h=self._h.clone(), c=None if self._c is None else self._c.clone())


class _RowText:
    """The text of one row behind its prompt, and where a stop string ends it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._stream = tokenizer.stream()
        for token in prompt:  # what a token stands for may depend on those before it
            self._stream.push(token)
        self._stops = stops
        self._overlap = max((len(stop) for stop in stops), default=1) - 1
        self.text = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that the tokens add, up to the end of a stop string."""
        return self._add("".join([self._stream.push(token) for token in tokens]))

    def flush(self) -> str:
        return self._add(self._stream.flush())

    def _add(self, piece: str) -> str:
        if self.stopped:
            return ""
        start = max(len(self.text) - self._overlap, 0)
        window = self.text[start:] + piece
        ends = [place + len(stop) for stop in self._stops if (place := window.find(stop)) >= 0]
        if ends:
            self.stopped = True
            piece = piece[: start + min(ends) - len(self.text)]
        self.text += piece
        return piece


def _stops(stop: Stop, model: TextModel) -> tuple[list[int], list[str]]:
    """The tokens and the strings to stop at."""
    tokens: list[int] = []
    strings: list[str] = []
    for item in () if stop is None else stop if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,):
        if isinstance(item, str):
            if model.tokenizer is None:
                raise ValueError("stop: expected tokens, as the model has no tokenizer, got a string")
            if not item:
                raise ValueError("stop: expected strings that are not empty, got ''")
            try:
                encoded = model.tokenizer.encode(item)
            except ValueError as error:
                raise ValueError(f"stop: {error}") from None
            # Bytes and characters: the string can only come as this token. A subword may hold it in its midst.
            if len(encoded) == 1 and model.tokenizer.kind != "subwords":
                tokens += encoded
            else:
                strings.append(item)
            continue
        _validate.integer("stop", item, 0)
        if item >= model.vocab_size:
            raise ValueError(f"stop: expected tokens 0 to {model.vocab_size - 1}, got {item}")
        tokens.append(item)
    return tokens, strings


# ---------------------------------------------------------------------------------------------------
# Values


def generate_values(
    model: RNN,
    prompt: Any,
    max_new_tokens: int,
    temperature: float,
    seed: Seed,
    n: int,
    state: GenerationState | None,
) -> Generation:
    _validate.integer("max_new_tokens", max_new_tokens, 1)
    _validate.integer("n", n, 1)
    features = model.config.input_size
    single = isinstance(prompt, Tensor) and prompt.dim() == 2
    stacked = isinstance(prompt, Tensor)
    prompts = [prompt] if single else _items(prompt)
    misshapen = stacked and prompt.dim() not in (2, 3)
    if misshapen or not prompts or not all(isinstance(item, Tensor) for item in prompts):
        raise TypeError(
            f"prompt: expected values (T, {features}) or (B, T, {features}), or a list of tensors (T, {features}), "
            f"none of them empty, got {_kind(prompt)}"
        )
    for item in prompts:
        if not item.is_floating_point() or item.dim() != 2 or item.shape[1] != features:
            dtype = dtype_name(item.dtype)
            raise ValueError(f"prompt: expected floats (T, {features}) a row, got {dtype} {tuple(item.shape)}")
        if not bool(torch.isfinite(item).all()):
            raise ValueError("prompt: expected finite values, got NaN or infinity")
        if len(item) == 0 and state is None:
            raise ValueError("prompt: expected at least one step where no state is continued, got an empty one")
    prompts = [item for item in prompts for _ in range(n)]
    rows = _ValueRows(model, prompts, max_new_tokens, temperature, _row_seeds(seed, len(prompts), state), state)
    single &= n == 1

    def result() -> Any:
        sequences = rows.sequences()
        return sequences[0] if single else torch.stack(sequences) if stacked else sequences

    return Generation((new[0] if single else new for new in rows.run()), result, rows.state)


class _ValueRows:
    """Rows of values and of states, a step at a time."""

    def __init__(
        self,
        model: RNN,
        prompts: list[Tensor],
        max_new_tokens: int,
        temperature: float,
        seeds: Tensor,
        state: GenerationState | None,
    ) -> None:
        device, n = model.device, len(prompts)
        self._model, self._temperature = model, temperature
        self._first = 0 if state is None else 1
        self._h, self._c, offset, _ = _start(model, n, state)
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        prompts = [item.to(device, dtype) for item in prompts]
        if state is not None:
            prompts = [torch.cat((state.pending[row : row + 1].to(p), p)) for row, p in enumerate(prompts)]
        self._given = torch.tensor([len(p) for p in prompts], device=device)
        self._end = self._given + max_new_tokens
        # NaN where a row has nothing: in a stream, too, while a longer prompt is read.
        self._values = torch.full((n, int(self._end.max()), model.config.input_size), math.nan, device=device).to(dtype)
        for row, p in enumerate(prompts):
            self._values[row, : len(p)] = p
        self._fed = torch.zeros(n, dtype=torch.int64, device=device)
        self._seeds = torch.stack((seeds.to(device), offset), dim=-1)
        self._weights, self._options = model.generation_weights(), model.generation_options()

    def run(self) -> Iterator[Tensor]:
        """(n, F) after every step in which a row drew."""
        _, weights, _, head_weight, head_bias = self._weights
        eps, *zoneout = self._options
        model = self._model
        for index in range(self._values.shape[1] - 1):
            rows = (index + 1 < self._end).nonzero().squeeze(1)
            x = model.standardised(self._values[rows, index])
            hidden = reference.generate.step_layers(model.mode, x, self._h, self._c, weights, rows, eps, zoneout)
            self._fed[rows] = index + 1
            drawing = index + 1 >= self._given[rows]
            if not bool(drawing.any()):
                continue
            rows, hidden = rows[drawing], hidden[drawing]
            parameters = torch.ops.fastgen.linear_rows(hidden, head_weight, head_bias)
            if not bool(torch.isfinite(parameters).all()):
                raise ValueError(
                    f"model: its prediction of step {index + 1} is NaN or infinite; the weights are damaged, or the "
                    "temperature is too large"
                )
            elements = torch.stack((self._seeds[rows, 0], self._seeds[rows, 1] + index + 1), dim=-1)
            drawn = model.density(parameters).draw(elements, self._temperature).to(self._values.dtype)
            self._values[rows, index + 1] = drawn
            new = torch.full_like(self._values[:, 0], math.nan)
            new[rows] = drawn
            yield new

    def sequences(self) -> list[Tensor]:
        lengths = torch.maximum(self._fed + 1, self._given).tolist()
        return [row[self._first : length].clone() for row, length in zip(self._values, lengths, strict=True)]

    def state(self) -> GenerationState:
        if bool((self._fed + 1 < self._given).any()):
            raise RuntimeError("state: expected every row to have a value of its own, some still read their prompt")
        return GenerationState(
            pending=self._values[torch.arange(len(self._fed)), self._fed],
            position=self._seeds[:, 1] + self._fed,
            seeds=self._seeds[:, 0].clone(),
            seen=None,
            h=self._h.clone(),
            c=None if self._c is None else self._c.clone(),
        )


# ---------------------------------------------------------------------------------------------------
# Both


def _start(model: RNN, n: int, state: GenerationState | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """h, c, the place (n,) of the rows' first token in their streams, and the tokens seen (n, vocab_size)."""
    config, device = model.config, model.device
    shape = (config.num_layers, n, config.hidden_size)
    if state is None:
        h = torch.zeros(shape, dtype=model.dtype, device=device)
        c = torch.zeros_like(h) if config.cell == "lstm" else None
        place = torch.zeros(n, dtype=torch.int64, device=device)
        return h, c, place, torch.zeros(n, config.vocab_size, dtype=torch.bool, device=device)
    if len(state) != n:
        raise ValueError(f"state: expected one of {n} rows, as the prompt has, got {len(state)}")
    vocabulary = 0 if state.seen is None else state.seen.shape[1]
    has_c = state.c is not None
    if state.h.shape != shape or has_c != (config.cell == "lstm") or vocabulary != config.vocab_size:
        raise ValueError("state: expected that of a model with this configuration, got another's")
    seen = torch.zeros(n, 0) if state.seen is None else state.seen.to(device, copy=True)
    h = state.h.to(device, model.dtype, copy=True)
    c = None if state.c is None else state.c.to(device, model.dtype, copy=True)
    return h, c, state.position.to(device), seen


def _row_seeds(seed: Seed, n: int, state: RowState | None) -> Tensor:
    """(n,) int64: the bits of each row's seed. One seed s stands for s, s + 1, ..., s + n - 1."""
    if state is not None:
        if seed is not None:
            raise ValueError(f"seed: expected None where a state is continued, which has its own, got {seed!r}")
        return state.seeds
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64) + torch.arange(n)
    if isinstance(seed, Iterable) and not (isinstance(seed, Tensor) and seed.dim() == 0):
        seeds = [_seed(item) for item in seed]
        if len(seeds) != n:
            raise ValueError(f"seed: expected one, or one for each of the {n} rows, got {len(seeds)}")
    else:
        first = _seed(seed)
        seeds = [(first + row) % _UINT64 for row in range(n)]
    return torch.tensor([value - _UINT64 if value >= _UINT64 // 2 else value for value in seeds])


def _seed(value: Any) -> int:
    seed = _validate.integer("seed", value, 0)
    if seed >= _UINT64:
        raise ValueError(f"seed: expected an int under 2**64, got {value!r}")
    return seed


def _items(prompt: Any) -> list[Any]:
    """The rows of a prompt, none of what has no rows."""
    rows = isinstance(prompt, (list, tuple)) or (isinstance(prompt, Tensor) and prompt.dim() > 0)
    return list(prompt) if rows else []


def _kind(value: Any) -> str:
    return f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
