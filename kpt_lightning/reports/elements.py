"""HTML and SVG elements. Text of users is escaped on its way out: it cannot become markup.

The standard library's ElementTree escapes by construction, where a template escapes only what its author marked.
"""

import re
import xml.etree.ElementTree as ET

Element = ET.Element
Child = Element | str | None
Attribute = str | float | bool | None

UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML forbids, and halves of surrogate pairs, which no file can hold."""

ISOLATE, END_ISOLATE = "\u2068", "\u2069"
"""Unicode's own isolation, for attributes, where no ``bdi`` can stand."""


def clean(text: str) -> str:
    """The text with every character that no page may hold shown as U+FFFD."""
    return UNFIT.sub("\ufffd", text)


def element(tag: str, *children: Child, **attributes: Attribute) -> Element:
    """One element.

    Args:
        tag: Its name.
        children: Elements and texts in order; None is left out.
        attributes: ``class_`` is class and ``aria_label`` is aria-label. True is an attribute without a value; None
            and False are left out.
    """
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    made = Element(
        tag, {name: _text_of(value) for name, value in given.items() if not (value is None or value is False)}
    )
    for child in children:
        if isinstance(child, str):
            _append_text(made, clean(child))
        elif child is not None:
            made.append(child)
    return made


def by_user(text: str, most: int = 0) -> Element:
    """Text of a user's: neither its direction nor its length reaches what stands beside it.

    Args:
        text: Anything.
        most: Characters to show; 0 for all. What was cut is in the ``title``.
    """
    if most and len(text) > most:
        return element("bdi", text[: most - 1] + "…", title=text)
    return element("bdi", text)


def isolated(text: str) -> str:
    """The same for an attribute or a ``title``."""
    return f"{ISOLATE}{text}{END_ISOLATE}"


def to_html(root: Element) -> str:
    """The element and all in it as HTML."""
    return ET.tostring(root, encoding="unicode", method="html")


def _text_of(value: Attribute) -> str:
    if value is True:
        return ""
    return clean(value) if isinstance(value, str) else f"{value:.10g}"


def _append_text(parent: Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text
