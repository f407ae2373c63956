"""Preference data: rows of any recognised format to token groups, kept in Arrow, with a report of what became of every
row.

    read_rows (readers) -> recognise, convert (formats, chat) -> tokenise, truncate (tokenize) -> PreferenceData

Shapes: G groups, C completions, T pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain, islice
from typing import Any, overload

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo.chat import BadRow, Chat
from dpo.comparisons import Comparisons, NoComparison, choose_pairs, decided_pairs, rank
from dpo.datareport import DataReport
from dpo.errors import UserError
from dpo.formats import Format, Record, prune, recognise
from dpo.merge import merge_prompts, prompt_keys
from dpo.packing import Group
from dpo.readers import NumberedRow, Source, read_rows
from dpo.spool import Spool
from dpo.tokenize import Codec, Ids, Limits

BATCH_ROWS = 1000
SNIFFED_ROWS = 100

_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "prompt": _IDS,
        "completions": pa.list_(_IDS),
        "chosen": _IDS,
        "rejected": _IDS,
        "pair_rows": pa.list_(pa.int64()),
        "rankings": pa.list_(_IDS),
        "sources": _IDS,
        "prompt_text": pa.string(),
        "completion_texts": pa.list_(pa.string()),
    }
)


def load_preferences(
    source: Source,
    tokenizer: Any,
    *,
    split: str | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    max_length: int | None = None,
    eos_token_ids: Sequence[int],
    max_bad_fraction: float = 0.05,
    comparisons: Comparisons | None = None,
    merge: int | None = None,
    name: str = "--data",
    chat_options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> PreferenceData:
    """Read, recognise, tokenise and check preference data.

    source: a .jsonl, .json, .csv or .parquet file, a folder, a dataset id, a `datasets.Dataset` or a sequence of dicts;
    `split` as in `train[:90%]`. max_prompt_length, max_completion_length, max_length: limits in tokens for a prompt, a
    completion (end-of-sequence included), and both together. eos_token_ids: every id that ends a generation of the
    model. max_bad_fraction: more unusable rows than this fraction is an error. comparisons: of scored or ranked
    completions (default: all pairs that differ). merge: where rows hold pairs, put those of one prompt into groups of
    up to so many pairs (default: a group a row). name: the flag that error messages begin with. chat_options: arguments
    for the chat template. progress: show the progress bars of `datasets`.

    Raises UserError (one line) for a source that cannot be read, an unknown format, or too many unusable rows.
    """
    for flag, limit in (("prompt", max_prompt_length), ("completion", max_completion_length), ("", max_length)):
        if limit is not None and limit < 1:
            raise UserError(f"--max-{flag}{'-' if flag else ''}length: expected at least 1 token; found {limit}")
    rows = read_rows(source, split=split, name=name, quiet=not progress)
    chat = Chat(tokenizer, chat_options)
    batches = rows.batches(BATCH_ROWS)
    first = next(batches, None)
    if first is None:
        raise UserError(f"{rows.label}: expected rows; found none")
    comparisons = comparisons or Comparisons()
    sniffed = [row for _, row in islice(first, SNIFFED_ROWS)]
    form = recognise(sniffed, label=rows.label, chat=chat, comparisons=comparisons)
    limits = Limits(max_prompt_length, max_completion_length, max_length)
    report = DataReport(rows.label, form.name, limits)
    if chat.has_template and not form.conversational:
        report.notes.append("plain text: used as it is, without the tokenizer's chat template")
    if comparisons.asks_for_scores and not form.scored:
        report.notes.append("no scores or ranks: every pair is compared as it is")
    codec = Codec(tokenizer, eos_token_ids)
    with Spool(_SCHEMA) as spool:
        for batch in chain([first], batches):
            tokenised = _tokenised(_records(batch, form, report), codec, report)
            spool.add(_groups(tokenised, codec, report, comparisons))
        report.check(max_bad_fraction)
        table = spool.finish()
    if merge is not None and not form.scored:
        table = merge_prompts(table, _SCHEMA, report, most_pairs=merge)
    return PreferenceData(table, report, scored=form.scored)


def _records(batch: Sequence[NumberedRow], form: Format, report: DataReport) -> Iterator[Record]:
    for number, row in batch:
        report.rows += 1
        try:
            record = form.convert(number, row)
            _check_unicode(record)
            report.pairs_dropped.update(prune(record, [text if text.strip() else "" for text in record.completions]))
        except BadRow as bad:
            report.drop(number, bad)
        else:
            report.ties += record.ties
            report.close += record.close
            yield record


def _check_unicode(record: Record) -> None:
    try:
        for text in (record.prompt, *record.completions):
            text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("text that is not valid Unicode", f"found {error.object[error.start]!r}") from None


def _tokenised(records: Iterator[Record], codec: Codec, report: DataReport) -> Iterator[tuple[Record, Ids, list[Ids]]]:
    """Records with the ids of their prompt and completions, in batches for speed, before any limit."""
    kept = list(records)
    joint = [record for record in kept if record.joint]
    for record, cut in zip(joint, codec.cut_points([(r.completions[0], r.completions[1]) for r in joint]), strict=True):
        record.prompt = record.completions[0][:cut]
        record.completions = [text[cut:] for text in record.completions]
    templated = bool(kept) and kept[0].templated
    prompts = codec.prompts([record.prompt for record in kept], templated=templated) if kept else []
    completions = iter(codec.completions([text for record in kept for text in record.completions]))
    for record, prompt in zip(kept, prompts, strict=True):
        closed = [codec.close(ids) for ids in islice(completions, len(record.completions))]
        report.cut_at_eos += sum(lost for _, lost in closed)
        yield record, prompt, [ids for ids, _ in closed]


def _groups(
    tokenised: Iterator[tuple[Record, Ids, list[Ids]]], codec: Codec, report: DataReport, comparisons: Comparisons
) -> Iterator[dict[str, Any]]:
    for record, prompt, completions in tokenised:
        try:
            yield _group(record, prompt, completions, codec, report, comparisons)
        except BadRow as bad:
            report.drop(record.row, bad)


def _group(
    record: Record, prompt: Ids, completions: list[Ids], codec: Codec, report: DataReport, comparisons: Comparisons
) -> dict[str, Any]:
    limits = report.limits
    cut = codec.cut_prompt(prompt, limits.prompt)
    if not cut:
        raise BadRow("empty prompt, and the tokenizer has no BOS to stand for it")
    room = limits.total - len(cut) if limits.total is not None else None
    if room is not None and room < 1:
        raise BadRow("prompt that fills the whole length limit", f"{len(cut)} tokens, limit {limits.total}")
    limit = min((bound for bound in (limits.completion, room) if bound is not None), default=None)
    shortened = [ids[:limit] for ids in completions]
    report.pairs_dropped.update(prune(record, shortened, after=" once tokenised and truncated"))
    rankings = _compare(record, shortened, comparisons, report)
    used = sorted({index for pair in record.pairs for index in pair})
    place = {old: new for new, old in enumerate(used)}
    report.truncated_prompts += len(cut) < len(prompt)
    report.truncated_completions += sum(len(shortened[i]) < len(completions[i]) for i in used)
    report.count(len(record.pairs), len(used), len(cut), max(len(shortened[i]) for i in used))
    return {
        "row": record.row,
        "prompt": cut,
        "completions": [shortened[i] for i in used],
        "chosen": [place[chosen] for chosen, _ in record.pairs],
        "rejected": [place[rejected] for _, rejected in record.pairs],
        "pair_rows": [record.row] * len(record.pairs),
        "rankings": [[place[index] for index in order] for order in rankings],
        "sources": used,
        "prompt_text": record.prompt,
        "completion_texts": [record.completions[i] for i in used],
    }


def _compare(record: Record, same: Sequence[Ids], comparisons: Comparisons, report: DataReport) -> list[list[int]]:
    """Leaves the pairs of a scored record that are asked for; returns its rankings, if those are."""
    if record.scores is None:
        return []
    record.pairs = choose_pairs(record.pairs, record.scores, comparisons, record.row)
    if comparisons.kind != "ranking":
        return []
    compared = sorted({index for pair in record.pairs for index in pair})
    # of identical completions the first keeps its place: a ranking of a text below itself says nothing
    first = {tuple(same[index]): index for index in reversed(compared)}
    kept = sorted(first.values())
    pairs = [pair for pair in record.pairs if set(pair) <= set(kept)]
    if not pairs:
        raise NoComparison("all scores tie once identical completions are left out")
    orders = rank(kept, record.scores, comparisons.top_k)
    record.pairs = decided_pairs(pairs, orders, comparisons.top_k)
    if len(compared) > len(kept):
        report.pairs_dropped["identical completions in a ranking"] += len(compared) - len(kept)
    report.rankings += 1
    report.tied_rankings += len(orders) > 1
    return orders


class PreferenceData(Sequence[Group]):
    """Token groups of one source in their input order; rows lie in Arrow and become a `Group` when asked for.
    Picklable.

    `report`: what became of the source's rows. Indices count kept groups from 0; `Group.row` is the row number in the
    source, from 1.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        report: DataReport,
        indices: np.ndarray | None = None,
        *,
        scored: bool = False,
    ):
        self.report, self.scored = report, scored
        self._table = table
        self._indices = np.arange(len(table)) if indices is None else np.asarray(indices, dtype=np.int64)
        columns = table.data
        self._prompt_lengths = _list_lengths(columns.column("prompt"))
        self._pair_counts = _list_lengths(columns.column("chosen"))
        self._ranked = _list_lengths(columns.column("rankings")) > 0
        counts = _list_lengths(columns.column("completions"))
        self._completion_lengths = _list_lengths(pc.call_function("list_flatten", [columns.column("completions")]))
        self._completion_starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> PreferenceData: ...
    def __getitem__(self, index: int | slice) -> Group | PreferenceData:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row = self._row(index, ("row", "prompt", "completions", "chosen", "rejected", "rankings"))
        pairs = list(zip(row["chosen"], row["rejected"], strict=True))
        return Group(row["prompt"], row["completions"], pairs, row["row"], row["rankings"])

    def sources(self, index: int) -> tuple[list[int], list[int]]:
        """The row number of each pair of a group (they differ where rows were merged), and of each completion its place
        among those of the row."""
        row = self._row(index, ("pair_rows", "sources"))
        return row["pair_rows"], row["sources"]

    def texts(self, index: int) -> dict[str, Any]:
        """{"prompt": str, "completions": [str, ..]}: whole texts as given or rendered, before truncation, without
        end-of-sequence added."""
        row = self._row(index, ("prompt_text", "completion_texts"))
        return {"prompt": row["prompt_text"], "completions": row["completion_texts"]}

    def lengths(self, index: int) -> tuple[int, list[int]]:
        """Tokens of the prompt and of each completion. Reads no tokens."""
        at = self._at(index)
        start, stop = self._completion_starts[at : at + 2]
        return int(self._prompt_lengths[at]), self._completion_lengths[start:stop].tolist()

    def longest_sequences(self) -> list[int]:
        """Tokens of the prompt with the longest completion, of every group. Reads no tokens."""
        longest = np.maximum.reduceat(self._completion_lengths, self._completion_starts[:-1])
        return (self._prompt_lengths + longest)[self._indices].tolist()

    def num_pairs(self, index: int) -> int:
        """Pairs of a group as a step counts them: a ranking is one comparison."""
        at = self._at(index)
        return 1 if self._ranked[at] else int(self._pair_counts[at])

    def check_tokens(self, vocabulary: int, name: str) -> None:
        """Raise UserError for a token that a model of `vocabulary` tokens does not have."""
        columns = self._table.data
        for column in (columns.column("prompt"), pc.call_function("list_flatten", [columns.column("completions")])):
            largest = pc.call_function("max", [pc.call_function("list_flatten", [column])]).as_py()
            if largest is not None and largest >= vocabulary:
                raise UserError(
                    f"{name}: expected tokens below {vocabulary}, the model's vocabulary; found {largest}: the "
                    "tokenizer is of another model, or has tokens that the model has no embedding for"
                )

    @property
    def total_pairs(self) -> int:
        return int(self._pair_counts[self._indices].sum())

    def digest(self) -> str:
        """A digest of the groups' ids, comparisons and order, whatever source they came from."""
        found = blake2b(self._indices.tobytes(), digest_size=16)
        for name in self._table.column_names:
            column = self._table.data.column(name)
            while pa.types.is_list(column.type):
                found.update(_list_lengths(column).tobytes())
                column = pc.call_function("list_flatten", [column])
            if not pa.types.is_string(column.type):
                for chunk in column.chunks:
                    found.update(chunk.to_numpy(zero_copy_only=False).tobytes())
        return found.hexdigest()

    def select(self, indices: Sequence[int] | np.ndarray) -> PreferenceData:
        """The groups at `indices`, in that order, over the same table. The report stays the whole source's."""
        chosen = copy.copy(self)
        chosen._indices = self._indices[np.asarray(indices, dtype=np.int64)]
        return chosen

    def _prompt_keys(self) -> list[bytes]:
        """A digest of each group's prompt tokens."""
        keys = prompt_keys(self._table)
        return [keys[at] for at in self._indices]

    def _at(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} groups")
        return int(self._indices[index])

    def _row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        table: Any = self._table[self._at(index)]
        return {name: table.column(name)[0].as_py() for name in columns}


def _list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pc.call_function("list_value_length", [column]).to_numpy().astype(np.int64)


def split_off(
    data: PreferenceData,
    *,
    fraction: float | None = None,
    count: int | None = None,
    seed: int = 0,
    keep_prompts_together: bool = True,
) -> tuple[PreferenceData, PreferenceData]:
    """(rest, held out): hold out `count` groups, or a `fraction` of them, drawn with `seed`; both keep the input order.

    Groups with the same prompt tokens stay on one side (unless told otherwise), so the held-out side may be smaller
    than asked for, by less than the largest such set. Raises UserError when that leaves nothing on one side.
    """
    if (fraction is None) == (count is None):
        raise ValueError(f"split_off: expected fraction or count, one of them; found {fraction=}, {count=}")
    wanted = count if count is not None else round(len(data) * (fraction or 0.0))
    source = data.report.source
    if not 0 < wanted < len(data):
        asked = "" if count is not None else f" (a fraction of {fraction})"
        raise UserError(f"{source}: expected to hold out from 1 to {len(data) - 1} groups; found {wanted}{asked}")
    keys = data._prompt_keys() if keep_prompts_together else range(len(data))
    together: dict[object, list[int]] = {}
    for index, key in enumerate(keys):
        together.setdefault(key, []).append(index)
    sets = list(together.values())
    held: list[int] = []
    for place in np.random.default_rng(seed).permutation(len(sets)):
        if len(held) + len(sets[place]) <= wanted:
            held += sets[place]
    if not held:
        found = (
            f"{len(sets)} different prompt{'s' if len(sets) > 1 else ''}, the rarest in {min(map(len, sets))} groups"
        )
        raise UserError(
            f"{source}: expected different prompts, to hold out {wanted} of {len(data)} groups with equal prompts on "
            f"one side; found {found}; give held-out data of its own (--eval-data)"
        )
    mask = np.zeros(len(data), dtype=bool)
    mask[held] = True
    return data.select(np.flatnonzero(~mask)), data.select(np.flatnonzero(mask))
