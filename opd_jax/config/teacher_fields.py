"""The config section `teachers`: several teachers of one student."""

# fmt: off
import math
from typing import Any

from opd_jax.config import teacher_list
from opd_jax.config.record import Choices, Field, Rule, Section

WAITING = ("device", "host")


def _is_list(text: str) -> bool:
    return teacher_list.parse(text) is not None


def _are_weights(weights: Any) -> bool:
    numbers = all(type(w) in (int, float) and math.isfinite(w) and w >= 0 for w in weights)
    return numbers and (not weights or sum(weights) > 0)


TEACHERS = Section("teachers", "Several teachers of one student (docs/teachers.md).", (
    Field("others", "",
          Rule("NAME=PATH,NAME=PATH with different names, or nothing", _is_list),
          "Further teachers beside that of teacher.path, each with a name and a Hugging Face folder or hub "
          "name; empty = one teacher."),
    Field("first", "first", Rule("a name without spaces, = and commas", teacher_list.is_name),
          "Name of the teacher of teacher.path among them."),
    Field("column", "", None,
          "Column of the data that names the teacher of each problem (domain routing, 2606.30406); empty = "
          "every rollout is scored by all of them, and teachers.weights mixes them."),
    Field("weights", (), Rule("finite numbers, at least 0 and not all 0, such as (0.5,0.5)", _are_weights),
          "Weights of the teachers' log-ratios in a mixture (2605.01347), that of teacher.path first, "
          "divided by their sum."),
    Field("wait", "device", Choices(WAITING),
          "Where teachers are while they do not score: on the devices, or in host memory."),
))
# fmt: on
