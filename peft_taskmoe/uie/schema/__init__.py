"""What can be asked for: labels with guidelines and slots, however a user writes them down.

A schema of classes::

    class Person(EntityType):
        '''Names of people.'''

    class WorksFor(RelationType):
        '''The head works for the tail.'''
        head: Person
        tail: Organisation | Company

    class Attack(EventType):
        '''Somebody attacks somebody.'''
        attacker: list[Person]
        place: Annotated[str, "where it happened"]

    schema = Schema.of(Person, WorksFor, Attack)
"""

from peft_taskmoe.uie.schema.classes import EntityType, EventType, RelationType
from peft_taskmoe.uie.schema.labels import TASKS, Kind, Label, SchemaError, Slot, Task
from peft_taskmoe.uie.schema.names import Names
from peft_taskmoe.uie.schema.schemas import Schema

__all__ = [
    "TASKS",
    "EntityType",
    "EventType",
    "Kind",
    "Label",
    "Names",
    "RelationType",
    "Schema",
    "SchemaError",
    "Slot",
    "Task",
]
