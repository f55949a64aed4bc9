"""The prompts that ask about a text, each with the window it shows and within a budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..alignment import Place
from ..prompt import PromptFormat, prompt_text
from ..records import Event, Problem, shift_record
from ..schema import Names, Schema
from .windows import Window, glued, split_windows


@dataclass(frozen=True, slots=True)
class PromptWindow:
    """A window and its prompt. `given` are the events asked about, with offsets of the window."""

    window: Window
    prompt: str
    given: tuple[Event, ...] = ()


def prompt_windows(
    text: str,
    schema: Schema,
    max_length: int,
    *,
    length: Callable[[str], int] = len,
    names: Names | None = None,
    given: Sequence[Event] = (),
    format: PromptFormat | None = None,
    overlap: int = 100,
    problems: list[Problem] | None = None,
) -> tuple[PromptWindow, ...]:
    """The prompts that ask about a whole text, each within a budget.

    Args:
        text: The text.
        schema: The labels to ask for; every prompt shows all of them.
        max_length: The most that `length` may say of a prompt.
        length: Length of a prompt, for instance `lambda prompt: len(tokenizer(prompt).input_ids)`.
        names: As for `prompt_text`.
        given: Events whose arguments are asked for. Each is asked about once, in the window in
            whose middle its trigger stands, or in one of its own where no window has it whole;
            windows without one are left out.
        format: As for `prompt_text`.
        overlap: As for `split_windows`.
        problems: Takes a `not_asked` problem for each given event that cannot be asked about: the
            text does not have its trigger where it is said to be, or the trigger alone is too
            long. None: such an event is an error.

    Returns:
        The windows with their prompts, in the order of the text.

    Raises:
        ValueError: The schema alone does not fit, or a given event cannot be asked about and
            `problems` is None.
    """
    asking = _Asking(text, schema, max_length, length, names, format, overlap)
    empty = length(asking.prompt(""))
    if empty >= max_length:
        raise ValueError(
            f"The prompt has a length of {empty} before any text, and {max_length} is allowed. "
            "Allow more, ask for fewer labels at once, shorten their guidelines, or use "
            '`PromptFormat(style="compact")`.'
        )
    if not given:
        return tuple(PromptWindow(one, asking.prompt(one.text)) for one in asking.windows())
    places: list[tuple[Event, Place]] = []  # two given events may be equal
    for event in given:
        place, why_not = asking.place_of(event)
        if not why_not:
            places.append((event, place))
            continue
        message = f"The given event `{event.label}` cannot be asked about. {why_not}"
        if problems is None:
            raise ValueError(message)
        source = json.dumps(event.to_dict(), ensure_ascii=False)
        problems.append(Problem("not_asked", message, source))
    parts = asking.about(places) if places else []
    return tuple(sorted(parts, key=lambda part: part.window.start))


@dataclass(frozen=True, slots=True)
class _Asking:
    """How one text is asked about; the fields are the arguments of `prompt_windows`."""

    text: str
    schema: Schema
    max_length: int
    length: Callable[[str], int]
    names: Names | None
    format: PromptFormat | None
    overlap: int

    def prompt(self, part: str, events: Sequence[Event] = ()) -> str:
        return prompt_text(part, self.schema, self.names, events, self.format)

    def windows(self, events: Sequence[Event] = ()) -> tuple[Window, ...]:
        """The windows of which every prompt may show these events."""
        return split_windows(
            self.text,
            self.max_length,
            length=lambda part: self.length(self.prompt(part, events)),
            overlap=self.overlap,
        )

    def part(self, window: Window, events: Sequence[Event]) -> PromptWindow:
        moved = tuple(_into(event, window) for event in events)
        return PromptWindow(window, self.prompt(window.text, moved), moved)

    def fits(self, part: PromptWindow) -> bool:
        return self.length(part.prompt) <= self.max_length

    def place_of(self, event: Event) -> tuple[Place, str]:
        """Where the trigger of a given event stands, or why it cannot be asked about."""
        trigger = event.trigger
        if trigger.start is None or trigger.end is None:
            start = self.text.find(trigger.text)
            place = (start, start + len(trigger.text))
            if start < 0:
                return place, f"The text has no {trigger.text!r}."
        else:
            place = (trigger.start, trigger.end)
            found = self.text[slice(*place)] if place[0] >= 0 else ""
            if found != trigger.text:
                return place, (
                    f"The text has {found!r} at {place[0]}:{place[1]}, where the trigger is said "
                    f"to be {trigger.text!r}."
                )
        alone = self.part(Window(self.text[slice(*place)], *place), [event])
        if self.fits(alone):
            return place, ""
        return place, (
            f"Its trigger of {place[1] - place[0]} characters makes a prompt of "
            f"{self.length(alone.prompt)}, and {self.max_length} is allowed. Allow more, or give a "
            "shorter trigger."
        )

    def about(self, places: Sequence[tuple[Event, Place]]) -> list[PromptWindow]:
        """The prompts about given events, each in one window."""
        # Any window may have to show all of them.
        worst = [Event(e.label, replace(e.trigger, start=None, end=None)) for e, _ in places]
        if len(places) > 1 and self.length(self.prompt("", worst)) >= self.max_length:
            middle = len(places) // 2
            return self.about(places[:middle]) + self.about(places[middle:])
        try:
            windows = self.windows(worst)
        except ValueError:  # a trigger leaves no room for more than itself
            windows = ()
        asked: dict[Window | None, list[tuple[Event, Place]]] = {}
        for event, place in places:
            asked.setdefault(_window_around(place, windows), []).append((event, place))
        alone = asked.pop(None, [])
        parts = []
        for window, inside in asked.items():
            assert window is not None
            part = self.part(window, [event for event, _ in inside])
            if self.fits(part):
                parts.append(part)
            else:  # the numbers of repeated triggers were not reckoned with
                alone += inside
        return parts + [self.part(self.own_window(*one), [one[0]]) for one in alone]

    def own_window(self, event: Event, place: Place) -> Window:
        """The widest window with a place in its middle that fits; the place alone does."""

        def fits(margin: int) -> bool:
            return self.fits(self.part(_widened(self.text, place, margin), [event]))

        fitting, step = 0, 1
        while step < len(self.text) and fits(step):  # gallop: nothing much longer is measured
            fitting, step = step, 2 * step
        limit = min(step, len(self.text))
        while fitting < limit:
            middle = (fitting + limit + 1) // 2
            if fits(middle):
                fitting = middle
            else:
                limit = middle - 1
        return _widened(self.text, place, fitting)


def _into(event: Event, window: Window) -> Event:
    """A given event with offsets of the window and without arguments."""
    moved = shift_record(replace(event, arguments=()), -window.start)
    assert isinstance(moved, Event)  # what is shifted stays what it is
    return moved


def _window_around(place: Place, windows: Sequence[Window]) -> Window | None:
    """The window in whose middle a place is, if one has it whole."""
    whole = [window for window in windows if window.start <= place[0] and place[1] <= window.end]
    return min(whole, key=lambda window: abs(window.start + window.end - sum(place)), default=None)


def _widened(text: str, place: Place, margin: int) -> Window:
    first, last = max(place[0] - margin, 0), min(place[1] + margin, len(text))
    while first < place[0] and glued(text, first):
        first += 1
    while last > place[1] and glued(text, last):
        last -= 1
    return Window(text[first:last], first, last)
