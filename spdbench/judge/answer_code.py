"""The code that an answer gives: its pieces among words, and the statements of these that a task's tests need."""

from __future__ import annotations

import ast
import re
import symtable
import warnings

ANSWER_LINE = "# <answer>"
"""Where the answer's code goes in a reference that is a program; without such a line it goes first."""

FENCE = re.compile(
    r"(?:^([ \t]*))?(`{3,}|~{3,})([^\n`]*)\n(.*?)(?:\n(?!\1[ \t]{4})[ \t]*\2|\Z)", re.DOTALL | re.MULTILINE
)
"""A fence that is indented by four more than the first is inside of the code, such as in a docstring."""
CLOSED = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*$", re.MULTILINE)
"""The end of a fence that the prompt has opened."""
CODE_BEGINS = re.compile(r"^(?:(?:def|class|from|import|async def)\s|@\w)", re.MULTILINE)
MAX_BEGINNINGS = 20
FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
SESSION = re.compile(r"^(?:>>>|\.\.\.) ?", re.MULTILINE)
"""What precedes each line that is typed to the interpreter."""
ENDS = frozenset({"exit", "_exit", "quit", "abort", "main"})
"""Methods that end the program before its tests have run."""


def program(answer: str, reference: str) -> str:
    """The program that comes to its end if the answer's code does what `reference` asks of it.

    Only those statements of the answer are kept that its tests need, so that examples of use and tests of the model's
    own can neither fail nor end the program; EvalPlus reads answers in the same way. Lines at a piece's end that are no
    Python, such as words behind the code, are omitted.
    """
    before, after = around_answer(reference)
    defined, loaded = _names(ast.parse(after), after) if is_python(after) else (set(), set())
    wanted = loaded - defined
    # Code without fences may begin at any line that looks like code, or like words such as "from this follows".
    for pieces in _readings(answer):
        code = "\n".join(filter(None, (_longest_python("", piece) for piece in pieces)))
        if needed := _needed(code, wanted):
            return f"{_joined(before, needed)}\n{after}"
    if before and (rest := max((_continued(before, piece, wanted) for piece in _pieces(answer)), key=len, default="")):
        return f"{before}{rest}\n{after}"
    code = code_in(answer)
    return f"{_joined(before, _longest_python(before, code) or code)}\n{after}"


def code_in(answer: str) -> str:
    """The first piece of code with a function in it, else the first piece."""
    pieces = _pieces(answer)
    return next((piece for piece in pieces if "def " in piece), pieces[0])


def _joined(before: str, code: str) -> str:
    """`code` behind `before`, but imports from the future first: nothing may precede these."""
    return "".join(FUTURE.findall(code)) + before + FUTURE.sub("", code)


def _readings(answer: str) -> list[list[str]]:
    """The ways in which the pieces of an answer may be cut out."""
    if FENCE.search(answer):
        return [_pieces(answer)]
    begins = list(CODE_BEGINS.finditer(answer))[:MAX_BEGINNINGS]
    return [[answer[begun.start() :]] for begun in begins] or [[answer]]


def _pieces(answer: str) -> list[str]:
    """The pieces of code in an answer, in order: what is in fences, and what comes before the first one where that is
    the inside of a function, or the prompt has opened a fence. Without any, all from the first line on that looks like
    code, or the whole text."""
    answer = answer.replace("<|python_tag|>", "\n")  # of Llama 3, in front of code
    begun, is_inside = CODE_BEGINS.search(answer), answer.lstrip("\r\n")[:1] in (" ", "\t")
    fence = FENCE.search(answer)
    if fence is None:
        return [answer if begun is None or is_inside else answer[begun.start() :]]
    pieces, first = [], answer[: fence.start()]
    if _longest_python("def inside():\n" if is_inside else "", first.lstrip("\r\n")).strip():
        pieces.append(first)
        if closed := CLOSED.match(answer, fence.start()):
            answer = answer[closed.end() :]
    return pieces + [_block(*parts) for parts in FENCE.findall(answer)]


def _block(indent: str, _: str, info: str, code: str) -> str:
    """A block's code, which may begin in the line of its fence, behind the name of a language."""
    _, space, rest = info.strip().partition(" ")
    begun = f"{rest}\n" if space and CODE_BEGINS.match(rest) else ""
    if code.startswith(">>> "):
        code = "\n".join(SESSION.sub("", line) for line in code.split("\n") if SESSION.match(line))
    return begun + _without_indent(code, len(indent))


def _without_indent(block: str, most: int) -> str:
    """A block without what its fence, in an item of a list, is indented by."""
    return re.sub(rf"^[ \t]{{0,{most}}}", "", block, flags=re.MULTILINE)


def _continued(before: str, piece: str, wanted: set[str]) -> str:
    """What a piece that is the inside of the function with which `before` ends adds to it: with its indentation, or
    without that of its first line or of all lines, whichever is the most; "" if it adds nothing."""
    piece = piece.lstrip("\r\n")
    forms = [piece, "    " + piece, re.sub(r"^(?=.)", "    ", piece, flags=re.MULTILINE)]
    longest = max((_longest_python(before, form) for form in forms if form[:1] in (" ", "\t")), key=len)
    if not longest.strip() or not before.rstrip("\n"):
        return ""
    code = before + longest
    return _needed(code, wanted, kept_lines=before.count("\n"))[len(before) :]


def _longest_python(before: str, code: str) -> str:
    """As many of the first lines of `code` as are Python behind `before`."""
    first, lines = before.count("\n"), code.split("\n")
    end = len(lines)
    while end > 0:
        text = "\n".join(lines[:end])
        error = _mistake(_joined(before, text))
        if error is None:
            return text
        # What is wrong in a line stays so whatever follows; at the end, one line less may do.
        end = min(end - 1, max(error - first - 1, 0))
    return ""


def _needed(code: str, wanted: set[str], kept_lines: int = 0) -> str:
    """`code` without the outermost statements that define nothing of `wanted`, or of what these use in turn; ""
    if it defines nothing of it. What begins in the first `kept_lines` is kept."""
    lines = code.split("\n")
    statements = ast.parse(code).body
    try:
        names = [_names(ast.Module([statement], []), ast.unparse(statement)) for statement in statements]
    except RecursionError:  # sums of a thousand terms can be parsed, and not written again
        return code
    used, chosen = set(wanted), {i for i, statement in enumerate(statements) if _first_line(statement) <= kept_lines}
    if "setrecursionlimit" in code:
        used.add("sys")
    used = used.union(*(names[i][1] for i in chosen))
    if wanted.isdisjoint(set[str]().union(*(defined for defined, _ in names))):
        return ""
    while more := {i for i, (defined, _) in enumerate(names) if i not in chosen and defined & (used | {"*"})}:
        chosen |= more
        used = used.union(*(names[i][1] for i in more))
    keep, drop = set[int](), set[int]()
    for i, statement in enumerate(statements):
        (keep if i in chosen else drop).update(range(_first_line(statement), (statement.end_lineno or 0) + 1))
    return "\n".join(line for number, line in enumerate(lines, start=1) if number in keep or number not in drop)


def _first_line(statement: ast.stmt) -> int:
    return int(min([statement.lineno, *(mark.lineno for mark in getattr(statement, "decorator_list", []))]))


def _names(tree: ast.Module, code: str) -> tuple[set[str], set[str]]:
    """The names that the outermost statements of `code` define or change, `*` for all of a module, and the global names
    that are used in it."""
    top = symtable.symtable(code, "answer", "exec")
    defined = {
        symbol.get_name()
        for symbol in top.get_symbols()
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
    }
    used = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    inner = list(top.get_children())
    while inner:
        table = inner.pop()
        used |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        inner += table.get_children()
    for statement in tree.body:
        defined |= _changed(statement)
    return defined, used


def _changed(statement: ast.stmt) -> set[str]:
    """Names of which a statement changes a part, as in `table[0] = 1`, or calls a method, as in `table.append(1)`."""
    if isinstance(statement, ast.ImportFrom) and any(alias.name == "*" for alias in statement.names):
        return {"*"}
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return set()
    parts = [
        node
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store)
    ]
    call = statement.value if isinstance(statement, ast.Expr) else None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr not in ENDS:
        parts.append(call.func)
    roots = set()
    for part in parts:
        root: ast.expr = part
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        roots |= {root.id} if isinstance(root, ast.Name) else set()
    return roots


def around_answer(reference: str) -> tuple[str, str]:
    """What a reference has before and after the place of the answer's code."""
    before, mark, after = reference.partition(f"{ANSWER_LINE}\n")
    return (before, after) if mark else ("", reference)


def is_python(text: str) -> bool:
    return _mistake(text) is None


def _mistake(text: str) -> int | None:
    """The line in which `text` stops being Python, 0 if that is unknown; None if it is Python throughout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes, which are the model's fault
        try:
            # As a tree first: the compiler alone sees a `return` outside of a function.
            compile(ast.parse(text), "answer", "exec", dont_inherit=True)
        except SyntaxError as error:
            return error.lineno or 0
        except (ValueError, RecursionError, MemoryError):
            return 0
    return None
