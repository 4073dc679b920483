"""benchmarks/compiled.json: what each configuration of the static gate compiled to, and a fingerprint of what it came from.

A fingerprint covers all that the compiled code depends on but the compiler: the kernel, the functions it calls, the module
constants these read, the types of its arguments, its constants and warps. Comments, docstrings and the place of a line do
not count. `make test` compiles a sample again and wants the fingerprint of every row to be that of today, so that a kernel
that changed is compiled whole, and checked, before a suite that passes can be committed with it.
"""

import ast
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.runtime.jit import ConstexprFunction, JITFunction

from adaselect_kernels.kernels.runtime import Compilation
from benchmarks import aot, records

TABLE = records.ROOT / "benchmarks" / "compiled.json"
REGENERATE = "run `python -m benchmarks static`"


class Row(NamedTuple):
    """A configuration on a target, as it compiled."""

    fingerprint: str
    registers: int
    spilled: int
    shared: int
    load_bits: int
    spills_in_loop: bool

    @classmethod
    def of(cls, job: aot.Job, report: aot.Report) -> "Row":
        costs = report.registers, report.spilled, report.shared, report.load_bits
        return cls(fingerprint(aot.find(job), job[1]), *costs, report.spills_in_loop)

    def report(self, job: aot.Job) -> aot.Report:
        loads = (self.load_bits,) if self.load_bits else ()
        return aot.Report(job[2], job[1], self.registers, self.spilled, self.shared, loads, self.spills_in_loop)


class Table(NamedTuple):
    triton: str  # the version that compiled it
    reader: str  # fingerprint of the code that read the reports
    rows: dict[aot.Job, Row]

    def reports(self) -> dict[aot.Job, aot.Report]:
        return {job: row.report(job) for job, row in self.rows.items()}


def read(path: Path = TABLE) -> Table:
    """The committed table; an empty one where there is none."""
    if not path.exists():
        return Table("", "", {})
    document = json.loads(path.read_text())
    rows = {tuple(key.split()): Row(*values) for key, values in document["rows"].items()}
    return Table(document["triton"], document["reader"], rows)


def write(table: Table, path: Path = TABLE) -> None:
    """A row a line, so that a difference of two tables can be read."""
    rows = ",\n".join(f'    "{" ".join(job)}": {json.dumps(row)}' for job, row in table.rows.items())
    head = f'  "triton": "{table.triton}",\n  "reader": "{table.reader}",\n  "fields": {json.dumps(Row._fields)},\n'
    path.write_text(f'{{\n{head}  "rows": {{\n{rows}\n  }}\n}}\n')


def stale(jobs: Sequence[aot.Job], table: Table) -> list[aot.Job]:
    """The jobs that the table does not answer: their code, or how reports are read, is not what it was made from."""
    if table.reader != reader():
        return list(jobs)
    known = {job: row.fingerprint for job, row in table.rows.items()}
    return [job for job in jobs if known.get(job) != fingerprint(aot.find(job), job[1])]


def refresh(path: Path = TABLE) -> dict[aot.Job, aot.Report]:
    """Compile what is stale, or all with another Triton than the table's; write the table, return every report."""
    table = read(path)
    if table.triton != triton.__version__:
        table = Table(triton.__version__, "", {})
    jobs = [job for family in aot.FAMILIES for job in aot.cover(family)]
    wanted = stale(jobs, table)
    rows = {job: row for job, row in table.rows.items() if job not in wanted}
    for job, report in zip(wanted, aot.compile_jobs(wanted), strict=True):
        rows[job] = Row.of(job, report)
        if len(rows) % 50 == 0:
            print(f"{len(rows)} of {len(jobs)} compiled", file=sys.stderr, flush=True)
    table = Table(triton.__version__, reader(), {job: rows[job] for job in jobs})
    write(table, path)
    return table.reports()


def fingerprint(entry: Compilation, target: str) -> str:
    given = aot.source(entry)
    arguments = [sorted(map(repr, each.items())) for each in (given.signature, given.constants, given.attrs)]
    return _digest([code(entry.kernel), *arguments, aot.options(entry), aot.TARGETS[target]])


def reader() -> str:
    return _digest([code(aot.compile_for)])


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


@cache
def code(function: Any) -> str:
    """A function, or a kernel, with all of its module that it calls and reads, as text that comments do not change."""
    function = getattr(function, "fn", function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    local = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    local |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} | {function.__name__}
    parts = [syntax(tree)]
    for name in sorted(({node.id for node in nodes} & function.__globals__.keys()) - local):
        value = function.__globals__[name]
        if inspect.isfunction(value) or isinstance(value, JITFunction):
            value = "" if value.__module__.startswith("triton.") else code(value)  # the compiler's own
        elif isinstance(value, ConstexprFunction) or inspect.ismodule(value) or inspect.isclass(value):
            continue
        parts.append(f"{name}: {value}")
    return "\n".join(parts)


def syntax(node: Any) -> str:
    """A syntax tree as text that every version of Python writes alike: without docstrings, positions and empty fields."""
    if isinstance(node, list):
        return " ".join(map(syntax, node))
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    left_out = ("ctx", "kind")
    kept = {name: value for name, value in fields.items() if name not in left_out and value not in (None, [])}
    text = " ".join(f"{name}={syntax(value)}" for name, value in kept.items())
    return f"{type(node).__name__}({text})"
