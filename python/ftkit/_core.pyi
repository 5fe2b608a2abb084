"""The Rust core, as Python sees it. `just check` holds this file against the module (stubtest)."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, final

from torch import Tensor

__version__: str

# plan

def replay(events: list[tuple[int, int, int]], categories: int) -> tuple[int, list[int], int, int]:
    """The peak of a trace of `(id, bytes, category)` lines: `(bytes, bytes by category, event index, bytes left)`.

    A line with `bytes >= 0` is a birth, one with `bytes < 0` the death of that id.
    Raises FtkitError for a trace that frees what does not live, or allocates what lives.
    """

def replay_on_gpu(events: list[tuple[int, int, int]], capacity: int, expandable: bool) -> int | None:
    """The most bytes that torch's caching allocator reserves for such a trace on a GPU of `capacity` bytes, with or
    without expandable segments; None where it has no room.

    Raises FtkitError as `replay` does.
    """

# optim
def blockwise_adamw(
    weight: Tensor,
    gradient: Tensor,
    mean: tuple[Tensor, Tensor, Tensor, Tensor],
    square: tuple[Tensor, Tensor, Tensor, Tensor],
    factors: tuple[float, float, float, float, float, float],
) -> None:
    """Moves weight and states in place: float32 [n]; a state is (codes uint8 [n], greatest float32 [⌈n / 256⌉], map
    float32 [256], edges float32 [255]); factors: beta1, beta2, epsilon, rate, correction, kept.
    """

# gguf
@final
class GgufFile:
    """An open, memory-mapped and checked GGUF file."""

    def __new__(cls, path: str | PathLike[str]) -> GgufFile: ...
    @property
    def metadata(self) -> dict[str, Any]:
        """Key → int, float, bool, str or list of these, in the file's order."""
    @property
    def metadata_types(self) -> dict[str, str]:
        """Key → `u32`, `string`, `[f32]` and so on, in the file's order."""
    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(name, shape in torch's order, block format such as `q4_1`), in the file's order."""
    def read(self, name: str, out: Tensor) -> None:
        """Writes a tensor's values to `out`: contiguous, on the CPU, same shape, float32, bfloat16 or float16.

        Raises InputError when there is no such tensor, the shape differs, or a value is NaN or infinite.
        """
    def read_blocks(self, name: str, out: Tensor) -> None:
        """Writes a tensor's blocks as they are to `out`: contiguous uint8, on the CPU, as many as it has bytes."""
    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor's blocks stand in the file: (first byte, number of bytes)."""
    def check(self, name: str) -> None:
        """Raises InputError when a value of the tensor is NaN or infinite."""

@final
class GgufWriter:
    """Writes a GGUF file: all is declared when it is made, then the tensors follow in that order.

    The file is there, whole, when `finish` returns; before that, and after a failure, there is nothing.
    """

    def __new__(
        cls,
        path: str | PathLike[str],
        metadata: Sequence[tuple[str, str, Any]],
        tensors: Sequence[tuple[str, Sequence[int], str]],
        overwrite: bool = False,
    ) -> GgufWriter:
        """`metadata`: (key, type as in `GgufFile.metadata_types`, value); `tensors`: (name, shape, format).

        Raises InputError when the file exists, a key comes twice, or rows don't divide into the format's blocks.
        """
    def write(self, name: str, values: Tensor, importance: Tensor | None = None) -> None:
        """Quantizes float32, bfloat16 or float16 values, contiguous on the CPU, to the tensor's format.

        `importance`: as for `quantize`.
        """
    def write_blocks(self, name: str, blocks: Tensor) -> None:
        """Writes the tensor's blocks as they are: contiguous uint8, on the CPU."""
    def finish(self) -> int:
        """Syncs the file, gives it its name, and returns its size in bytes."""
    def abandon(self) -> None:
        """Drops what was written so far."""

# quant
def set_threads(count: int) -> None:
    """Bounds the threads of the products and steps to come."""

def block_matmul(kind: str, blocks: Tensor, x: Tensor, out: Tensor, training: bool) -> None:
    """Writes x Wᵀ to `out`, both float32 or both bfloat16: x [T, in], W uint8 [out, bytes of a row] in blocks of
    `kind`; in training, in whatever order is fastest here. Raises for bfloat16 where it isn't multiplied
    (`multiplies_bfloat16`)."""

def block_matmul_transposed(kind: str, blocks: Tensor, dy: Tensor, out: Tensor) -> None:
    """Writes dy W to `out`: dy [T, out] and `out` [T, in] float32, or dy bfloat16 and `out` either; W uint8
    [out, bytes of a row] in blocks of `kind`."""

def multiplies_bfloat16() -> bool:
    """Whether the core multiplies bfloat16 on this machine: its tiles do."""

def lora_forward(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    y: Sequence[Tensor],
    low: Sequence[Tensor],
) -> None:
    """Adds s low Bᵀ to each of `y`, and writes x Aᵀ to each of `low`."""

def lora_backward(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dy: Sequence[Tensor],
    low: Sequence[Tensor],
    dlow: Sequence[Tensor],
    da: Sequence[Tensor | None],
    db: Sequence[Tensor | None],
    dx: Tensor | None,
) -> None:
    """Writes the gradients of `lora_forward`, and adds to that of x."""

def low_rank_forward(
    x: Tensor,
    frozen: Sequence[CodedMatrix | tuple[str, Tensor]],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    y: Sequence[Tensor],
    low: Sequence[Tensor],
) -> None:
    """Writes x Wᵀ + s low Bᵀ to each of `y`, and low = x Aᵀ to each of `low`: A [rank, in] and B [out, rank] float32,
    all others bfloat16. A frozen W is a `CodedMatrix` or (format, blocks uint8 [out, bytes of a row])."""

def low_rank_backward(
    x: Tensor,
    frozen: Sequence[CodedMatrix | tuple[str, Tensor]],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dy: Sequence[Tensor],
    low: Sequence[Tensor],
    da: Sequence[Tensor | None],
    db: Sequence[Tensor | None],
    dx: Tensor | None,
) -> None:
    """Writes the gradients of `low_rank_forward`: those of A and B, float32, and that of x where they are asked for."""

def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    shared: Sequence[int],
    scale: float,
    window: int | None,
    y: Tensor,
    m: Tensor,
) -> None:
    """Writes attention inside sequences to `y`, and each row's log-sum-exp to `m` [T, heads]."""

def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    shared: Sequence[int],
    scale: float,
    window: int | None,
    y: Tensor,
    m: Tensor,
    dy: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes the gradients of `attention_forward`."""

def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float, y: Tensor, roots: Tensor) -> None:
    """Writes weight ⊙ x r to `y` and r = 1 / √(mean(x²) + ε) to `roots`."""

def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, roots: Tensor, dx: Tensor) -> None:
    """Writes the gradient of `rms_norm_forward` in x."""

def swiglu_forward(gate: Tensor, up: Tensor, y: Tensor) -> None:
    """Writes silu(gate) ⊙ up."""

def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Writes the gradients of `swiglu_forward`."""

def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool, y: Tensor) -> None:
    """Writes each head, turned by its token's angles, or back."""

def cross_entropy(z: Tensor, targets: Tensor, losses: Tensor, slopes: Tensor | None) -> None:
    """Writes log Σ exp(z) − z[target] of each row of z [rows, V] to `losses` float32 [rows], and its gradient to
    `slopes` where it is asked for; targets int64 [rows]. Raises for targets that aren't below V."""

@final
class PackedMatrix:
    """A matrix packed for products with activations rounded to 8 bits."""

    @staticmethod
    def of(kind: str, blocks: Tensor) -> PackedMatrix | None:
        """Packs blocks uint8 [out, bytes of a row]; None for formats that aren't whole numbers."""
    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
    def matmul(self, x: Tensor, out: Tensor) -> None:
        """Writes x Wᵀ to `out`: x float32 [T, in], out float32 [T, out]."""

@final
class CodedMatrix:
    """A matrix of codes into a table, with a number for each group of a row: w = table[code] · scale (+ offset)."""

    def __new__(
        cls,
        codes: Tensor,
        table: Tensor | None,
        shape: tuple[int, int],
        group: int,
        scales: Tensor,
        nested: tuple[Tensor, Tensor, float] | None = None,
        offsets: Tensor | None = None,
    ) -> CodedMatrix:
        """Over the tensors' memory. codes: uint8, 4 bits each (the first in the high half) into a table of 16, or 8
        into one of 256; without a table they are whole numbers with sign. scales, offsets: float32 or float16, one for
        each group of the flattened matrix. nested: (map [256], greatest of each 256 groups, mean), and scales are codes
        into the map: map[code] · greatest + mean.
        """
    def matmul(self, x: Tensor, out: Tensor, training: bool) -> None:
        """Writes x Wᵀ to `out`, both float32 or both bfloat16: x [T, in], out [T, out]; in training, in whatever order
        is fastest."""
    def matmul_transposed(self, dy: Tensor, out: Tensor) -> None:
        """Writes dy W to `out`: dy [T, out] and out [T, in] float32, or dy bfloat16 and `out` either."""
    def dequantize(self, out: Tensor) -> None:
        """Writes W to `out`, float32 [out, in]."""

@final
class DecoderLayers:
    """A decoder's layers over the memory of the model's tensors, for one forward pass without gradients a call."""

    def __new__(
        cls,
        layers: Sequence[tuple[Sequence[Tensor], Sequence[Tensor], int | None, Sequence[tuple[Any, ...]]]],
        head: tuple[Tensor, tuple[Any, ...]] | None,
        heads: int,
        key_value_heads: int,
        head_dim: int,
        epsilon: float,
    ) -> DecoderLayers:
        """A layer: (its two norms, the norms of queries and keys or none, window, linear layers from q to down).
        The head: (the last norm, a linear layer).

        A linear layer: (matrix, inputs, bias or None), the matrix a `PackedMatrix`, a
        `CodedMatrix`, or (format, blocks uint8 [out, bytes of a row]).
        """
    def add_adapter(self, adapter: int, loras: Sequence[tuple[Any, ...] | None]) -> None:
        """What an adapter adds to each linear layer, in order, the head's last: (A [rank, in], B [out, rank], False,
        scale) in float32, or with Bᵀ [rank, out] and True; None where it adds nothing."""
    def add_paged_adapter(self, adapter: int, form: LoraForm, pool: Tensor, pages: Sequence[int]) -> None:
        """The same of an adapter whose matrices lie in these pages of `pool` uint8 [P, bytes of a page]."""
    def remove_adapter(self, adapter: int) -> None:
        """Takes an adapter off."""
    @property
    def has_head(self) -> bool:
        """Whether logits can be asked for."""
    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        block_table: Tensor,
        pages: Tensor,
        spans: Sequence[tuple[int, int, int]],
    ) -> None:
        """Computes x float32 [T, d] through all layers, in place; keys and values go to `pages`.

        `spans`: (adapter, first row, row after the last).
        """

@final
class LoraForm:
    """What LoRAs of one shape have in common: where their files have the matrices, and where pages do."""

    @staticmethod
    def of(
        pairs: Sequence[tuple[int, tuple[int, int], int, float, tuple[str, int], tuple[str, int]]], page_bytes: int
    ) -> LoraForm | None:
        """Of each linear layer: (its number in the order of the forward pass, (out, in), rank, scale, where the file
        has A [rank, in] and B [out, rank]: (F32, F16 or BF16, first byte)). None where pages cannot hold them."""
    @property
    def pages(self) -> int:
        """Pages that an adapter takes."""
    @property
    def pairs(self) -> list[tuple[int, tuple[int, int], int, float, tuple[int, int], tuple[int, int]]]:
        """Of each linear layer, the same with the places of A and of Bᵀ [rank, out], float32: (which of the adapter's
        pages, first byte)."""
    def write(self, file: bytes, pages: Tensor) -> bool:
        """Writes an adapter from its file's bytes to `pages` uint8 [pages, bytes of a page]; False when the file ends
        too early or has a number that is not finite."""

@final
class DecoderStep:
    """A decoder's step over a pool of pages, from token ids to logits."""

    def __new__(
        cls, layers: DecoderLayers, embedding: tuple[Any, int], angles: tuple[Tensor, Tensor], pages: Tensor
    ) -> DecoderStep:
        """`embedding`: (a matrix as a linear layer's, its width); `angles`: cos and sin of every position, float32
        [positions · head_dim / 2]; `pages` as `DecoderLayers.forward` takes them."""
    @property
    def layers(self) -> DecoderLayers:
        """The layers that it computes."""
    def knows(self, adapters: Sequence[int]) -> bool:
        """Whether the batches of these adapters can be computed here."""
    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        adapters: Sequence[int],
        block_table: Tensor,
        rows: Tensor,
        logits: Tensor,
    ) -> None:
        """Writes the float32 logits [rows, vocabulary] of a batch to `logits`; i32 tensors, as a ragged batch has
        them."""

def quant_formats() -> list[tuple[str, int, int]]:
    """The block formats: (name, values in a block, bytes of a block)."""

def quantize(kind: str, values: Tensor, out: Tensor, importance: Tensor | None = None) -> None:
    """Writes float32, bfloat16 or float16 `values` as blocks of the format `kind` to `out` (uint8).

    With `importance`, float32 [columns] of any scale, the scales are those of the least Σ importance (x − x̂)²; zero
    counts next to nothing. Raises InputError for a negative or not finite one.
    """

def dequantize(kind: str, blocks: Tensor, out: Tensor) -> None:
    """Writes the values of `blocks` (uint8, of the format `kind`) to `out` (float32)."""

# text

@final
class Tokenizer:
    """A model's tokenizer: text to ids and back."""

    @staticmethod
    def from_dir(path: str | PathLike[str]) -> Tokenizer:
        """The tokenizer of a model's directory: `tokenizer.json`, with the small files that say more about it."""
    @staticmethod
    def from_gguf(path: str | PathLike[str]) -> Tokenizer:
        """The tokenizer rebuilt from a GGUF file's metadata."""
    def encode(self, text: str, specials: bool = True) -> list[int]:
        """The ids of `text`, none added; without `specials`, a special token's text is text like any other."""
    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a raw prompt, behind the token that opens every text where the tokenizer adds one by itself."""
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; ids beyond the vocabulary have none."""
    def stream(self) -> StreamDecoder:
        """A decoder that takes ids one at a time."""
    def id_of(self, token: str) -> int | None: ...
    def token_of(self, id: int) -> str | None: ...
    def is_special(self, id: int) -> bool: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def end_ids(self) -> list[int]:
        """The ids at which generation stops, ascending: the end of a sequence and those of a turn."""
    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
    @property
    def hash(self) -> str:
        """blake3, in hex, of all that decides the ids."""
    def save(self, path: str | PathLike[str], template: ChatTemplate | None = None) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` for transformers' AutoTokenizer."""

@final
class StreamDecoder:
    """Text from ids as they come: never half a character; special tokens are skipped."""

    def push(self, id: int) -> str:
        """Takes the next id; gives the text that is certain now."""
    def finish(self) -> str:
        """What is left when no id follows."""

@final
class ChatTemplate:
    """A model's chat template, rendered as transformers' `apply_chat_template` does, within limits."""

    @staticmethod
    def from_dir(path: str | PathLike[str]) -> ChatTemplate | None:
        """The template of a model's directory; None for a model that has none."""
    @staticmethod
    def from_gguf(path: str | PathLike[str]) -> ChatTemplate | None:
        """The template in a GGUF file's metadata; None for a file that has none."""
    @staticmethod
    def from_source(source: str, bos_token: str | None = None, eos_token: str | None = None) -> ChatTemplate: ...
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **extra: Any,
    ) -> str:
        """The text of a conversation. Raises InputError with what the template raises and its line."""
    @property
    def source(self) -> str: ...
    @property
    def hash(self) -> str:
        """blake3, in hex, of all that decides the text."""

def encode_conversation(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    train_on: str = "assistant",
    **extra: Any,
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which are trained on: those of the assistant's turns, of the `last`, or `all`.

    Special-token text inside a message stays text. Raises InputError when a turn's tokens cannot be proven.
    """

def encode_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **extra: Any,
) -> list[int]:
    """The ids that ask for the assistant's next turn. Special-token text inside a message stays text."""

# data
@final
class PreparedData:
    """A prepared dataset: sequences of tokens in a memory-mapped cache."""

    def __len__(self) -> int:
        """Sequences."""
    @property
    def fingerprint(self) -> str:
        """Hash of the data and of all that decides its tokens."""
    @property
    def problems(self) -> list[str]:
        """What was wrong with the first rows that were skipped; empty when the cache was there already."""
    @property
    def statistics(self) -> dict[str, int]:
        """Counts: rows, bad_rows, truncated_rows, split_rows, masked_rows, duplicate_rows, sequences, tokens, …"""
    @property
    def tasks(self) -> list[str]:
        """The names of tasks, in the order of their numbers; empty when they were not asked for."""
    def lengths(self) -> list[int]:
        """The sequences' lengths, in tokens."""
    def sequence(self, index: int) -> tuple[list[int], list[bool]]:
        """A sequence's token ids, and whether each is trained on."""
    def split(
        self, room: int, seed: int, held_out: float, together: int = 1, share: bool = False
    ) -> tuple[PackedRows, PackedRows | None]:
        """Packs into rows of `room` tokens what is trained on, and the share `held_out` that isn't.

        Examples that follow one another belong together as long as they have at most `together` sequences. `share`:
        what both answers of a pair begin with stands in the first of them alone.
        """

@final
class PackedRows:
    """Packed rows of a dataset, or of its held-out part."""

    def __len__(self) -> int: ...
    @property
    def units(self) -> int:
        """How many examples there are."""
    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
    @property
    def fill(self) -> float:
        """The share of the rows' room that holds tokens."""
    def order(self, seed: int, number: int) -> list[int]:
        """The rows in the order of the `number`-th pass."""
    def lengths(self, rows: list[int]) -> list[int]:
        """The lengths of the sequences in these rows, in order."""
    def shared(self, rows: list[int]) -> list[int]:
        """How many tokens each of these rows' sequences leaves out, in order."""
    def trained(self, rows: list[int]) -> int:
        """How many targets of these rows are trained on."""
    def sizes(self, rows: list[int]) -> tuple[int, int]:
        """Tokens and sequences of these rows together."""
    def write(
        self,
        rows: list[int],
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        group: Tensor,
        task: Tensor,
    ) -> None:
        """Writes the rows to i32 tensors: [T], [T], [T], [N + 1], [N], [N], with T and N as `sizes` says."""

def prepare_data(
    paths: Sequence[str | PathLike[str]],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    max_tokens: int,
    schema: str | None = None,
    mapping: dict[str, str] | None = None,
    train_on: str = "assistant",
    long_rows: str = "truncate",
    tasks: bool = False,
    skip_bad_rows: int = 0,
    cache: str | PathLike[str],
    progress: Callable[[int], None] | None = None,
) -> PreparedData:
    """Prepares a dataset below `cache`, or opens what an equal call has prepared; `progress` gets the rows so far.

    `tasks`: every row names its task in a column `task`.

    Raises InputError for sources that cannot be read, more bad rows than allowed, or nothing left to train on.
    """

# serve
def paged_attention(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    out: Tensor,
    layer: int,
    scale: float,
    window: int | None = None,
) -> None:
    """Writes attention of q [T, heads, head_dim] over pages to `out`; see `ftkit.kernels.paged_attention`."""

def sampling_probabilities(
    logits: Sequence[float], sampling: str, prompt: Sequence[int] = ..., generated: Sequence[int] = ...
) -> list[tuple[int, float]]:
    """(token, probability) of the tokens that may be drawn after `generated`, by id. `sampling` is JSON."""

def hashed_key(key: str) -> str:
    """The hash of an API key, as files of keys hold it."""

def content_hash(path: str | PathLike[str]) -> str:
    """BLAKE3 of a file's content, in hexadecimal."""

@final
class Listener:
    """A port of this machine, taken for a server that starts later. Raises InputError when it is in use."""

    def __new__(cls, host: str, port: int) -> Listener: ...
    @property
    def url(self) -> str:
        """Where this machine reaches it, such as `http://127.0.0.1:8000`."""
    @property
    def loopback(self) -> bool:
        """Whether other machines can't reach it."""

@final
class Stream:
    """One answer while it grows; dropping it cancels the request."""

    def __iter__(self) -> Stream: ...
    def __next__(
        self,
    ) -> tuple[str, list[tuple[int, float | None, list[tuple[int, float]]]], str | None, tuple[int, int, int] | None]:
        """(text, tokens as (id, log-probability, likeliest), finish reason, (tokens of the prompt, of these cached,
        generated)).

        The last two come with the last item. Waits; Ctrl-C interrupts. Raises FtkitError when the request failed.
        """
    def rest(
        self,
    ) -> tuple[str, list[tuple[int, float | None, list[tuple[int, float]]]], str | None, tuple[int, int, int] | None]:
        """All that is still to come, as one item. Waits and raises as an iteration does."""
    def cancel(self) -> None:
        """Ends the request; its pages are free before the next step."""

@final
class Pen:
    """Where an author asks for the parts of an answer over HTTP, and where he puts them."""

    def submit(self, prompt: Sequence[int], answered: int, sampling: str) -> Stream:
        """Asks for a part, with the model, the client and the priority of the request; as `Engine.submit`."""
    @property
    def closed(self) -> bool:
        """Whether nobody listens any more."""
    def send(self, text: str, tokens: Sequence[tuple[int, float | None, list[tuple[int, float]]]]) -> bool:
        """Gives more of the answer; False when nobody listens any more."""
    def finish(
        self,
        text: str,
        tokens: Sequence[tuple[int, float | None, list[tuple[int, float]]]],
        reason: str,
        stop: int | None,
        usage: tuple[int, int, int],
        sources: Sequence[tuple[str, str]],
    ) -> bool:
        """The rest of it. `stop`: the number of the stop string that ended it; `usage`: tokens of the prompt, those of
        them that were in the pool, tokens generated; `sources`: where the passages stand, and their texts."""
    def fail(self, message: str, input: bool) -> bool:
        """No more of it. `input`: because of what was asked."""

@final
class Engine:
    """A scheduler on a thread of its own, which calls `step` for each batch."""

    def __new__(
        cls,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        step: Callable[[int, int, int, tuple[int, ...], tuple[int, ...]], Tensor],
        workspace: Sequence[Tensor],
        *,
        name: str,
        content: str,
        batch_tokens: int,
        sequences: int,
        waiting: int,
        block_tokens: int,
        pages: int,
        page_bytes: int,
        context_tokens: int,
        draft_tokens: int,
        draft_model: bool,
        vocabulary: int,
    ) -> Engine:
        """`step(tokens, blocks, rows, lengths, adapters)` returns float32 logits [rows, vocabulary] on the CPU.

        Before each call the batch is written to `workspace`, int32 tensors on the CPU: tokens, positions, cu_seqlens,
        adapter, block_table (`blocks` numbers a sequence), rows (whose logits are wanted). For embeddings,
        `step.hidden` gets the same and returns the hidden states, float32 [tokens, d] on the CPU. With `draft_model`,
        `step.draft` takes and returns the same as `step`, by the model that makes drafts, under no adapter; it gets
        each batch that `step` gets, with no rows wanted. `step.whole` and `step.whole_draft` are the two as
        `DecoderStep`, or None. `content` is a hash of the base model's weights. For adapters on disk:
        `step.fetch(adapter)` returns (pages, hash of its content), on another thread; `step.install(adapter, pages)`,
        `step.evict(adapter)` and `step.forget(adapter)`.
        """
    @property
    def models(self) -> list[str]:
        """The names that requests may ask for, the base model's first."""
    def add_adapter(self, name: str, adapter: int) -> None:
        """Lets requests ask for an adapter by name. Raises InputError when the name is in use."""
    def replace_adapter(self, name: str, adapter: int) -> int:
        """Lets a name mean another adapter from now on, and returns the one before; requests under way keep that."""
    def know(self, adapter: int) -> None:
        """The adapter is on disk: `step.fetch` reads it when a request needs it, `step.install` writes it to pages."""
    def forget(self, adapter: int) -> None:
        """No request will name the adapter any more; `step.forget` is called when the last that did has ended."""
    def remove_adapter(self, name: str) -> int:
        """Takes the name away and returns the adapter's id; requests under way still use it."""
    def held(self, adapter: int) -> bool:
        """Whether a request over HTTP still holds an adapter whose name was taken away."""
    def submit(
        self,
        prompt: Sequence[int],
        sampling: str,
        model: str | None = None,
        priority: int = 0,
        first_token_seconds: float | None = None,
        answered: int = 0,
    ) -> Stream:
        """Asks for an answer. Raises InputError when it can't be given, FtkitError when the queue is full.

        `priority`: −8 to 8, each step doubles the share among the requests that wait. The answer fails as soon as its
        first token cannot be there within `first_token_seconds`. The prompt's last `answered` tokens are of the answer
        already: penalties count them as such.
        """
    def metrics(self) -> dict[str, int]:
        """What the engine has counted, by name."""
    def set_keys(self, keys: str) -> None:
        """The keys that requests may bring, from now on: JSON, a list of them. Raises InputError, and keeps the old."""
    def set_alias(self, name: str, targets: Sequence[tuple[str, int]]) -> None:
        """Lets requests over HTTP ask for `name`: each of the targets gets its weight's share of them."""
    def remove_alias(self, name: str) -> bool:
        """Takes an alias away; whether there was one."""
    def describe(self, model: str, fingerprint: str | None) -> None:
        """Notes what a model is made of, None: forgets it."""
    def traffic(self, model: str) -> tuple[int, int, int]:
        """Requests, prompt tokens and generated tokens of a model over HTTP."""
    def serve(
        self,
        listener: Listener,
        ready: Callable[[], object],
        model: str,
        *,
        body_bytes: int,
        upload_bytes: int,
        stuck_seconds: float,
        api_key: str | None = None,
        desk: Callable[[str, str], str] | None = None,
        author: Callable[[str, str, Pen], None] | None = None,
        access_log: str | PathLike[str] | None = None,
        first_token_seconds: float | None = None,
    ) -> None:
        """Serves over HTTP until SIGINT or SIGTERM, then until answers under way are done.

        `model`: the name that answers requests which give none. `desk(what, arguments)` takes and gives JSON:
        `{"done": …}` or `{"refused": {"status", "message", "param", "code"}}`.
        `first_token_seconds`: requests whose first token cannot come within it are refused. `author(messages, sampling,
        pen)`, both JSON, answers conversations.
        """
    def close(self) -> None:
        """Fails what is under way and ends the thread."""
