"""The quantile level of every group: by schedule, by data source, dithered, or by a gate that remembers.

QAE sees of a level only its rank m = ceil(K G). A rank drawn or a regime decided elsewhere is therefore handed over as
the level (2 m - 1) / (2 G), whose rank is m and nothing else.

P groups, G valid responses of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from megatron_rlvr.config.schema import AdvantageConfig, KCourse, KScheduleConfig
from megatron_rlvr.entropy.prompt_gate import PromptGate, Verdicts
from megatron_rlvr.entropy.schedule import ConstantK, CosineK, KSchedule, PiecewiseLinearK, TwoPhaseK, dithered_rank
from megatron_rlvr.ops.exact import parse_quantile_level
from megatron_rlvr.types import RolloutGroup


def build_schedule(config: AdvantageConfig) -> KSchedule:
    """The course of K over rollout steps, the first being 1.

    Raises:
        ValueError: a field that the kind needs is missing, or has no effect with it, by its name in the configuration.
    """
    course = config.K_schedule
    needed = {
        KCourse.constant: (),
        KCourse.piecewise: ("points",),
        KCourse.cosine: ("end", "last_step"),
        KCourse.two_phase: ("end", "switch_step"),
    }[course.kind]
    optional = ("first_step",) if course.kind is KCourse.cosine else ()
    default = KScheduleConfig()
    for name in ("points", "end", "first_step", "last_step", "switch_step"):
        value = getattr(course, name)
        changed = value != getattr(default, name)
        if name in needed and not changed:
            raise ValueError(f"advantage.K_schedule.{name} must be given with kind={course.kind.value}, got {value!r}")
        if changed and name not in (*needed, *optional):
            raise ValueError(
                f"advantage.K_schedule.{name} has no effect with advantage.K_schedule.kind={course.kind.value}, "
                f"got {value!r}"
            )
    if course.kind is KCourse.piecewise and config.K != AdvantageConfig().K:
        raise ValueError(f"advantage.K has no effect with advantage.K_schedule.kind=piecewise, got {config.K!r}")
    if course.end is not None:
        try:
            parse_quantile_level(course.end)
        except ValueError as error:
            raise ValueError(f"advantage.K_schedule.end: {error}") from None
    try:
        return _schedule(config.K, course)
    except ValueError as error:
        raise ValueError(f"advantage.K_schedule: {error}") from None


def _schedule(start: str, course: KScheduleConfig) -> KSchedule:
    if course.kind is KCourse.constant:
        return ConstantK(start)
    if course.kind is KCourse.piecewise:
        return PiecewiseLinearK([(point.step, point.K) for point in course.points])
    assert course.end is not None, "checked above"
    if course.kind is KCourse.two_phase:
        assert course.switch_step is not None, "checked above"
        return TwoPhaseK(start, course.end, switch_step=course.switch_step)
    assert course.last_step is not None, "checked above"
    return CosineK(start, course.end, first_step=course.first_step, last_step=course.last_step)


class GroupLevels:
    """From groups to their levels.

    Args:
        config: the advantage section, checked.
        seed: of the dithered ranks.
    """

    def __init__(self, config: AdvantageConfig, *, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.by_source = {entry.source: parse_quantile_level(entry.K) for entry in config.K_by_source}
        self.gate = PromptGate(config.gate_memory)

    @property
    def remembers(self) -> bool:
        """Whether visits of prompts must be learnt."""
        return self.gate.memory > 0

    def level_of(self, source: str, base: Fraction) -> Fraction:
        """K of a data source."""
        return self.by_source.get(source, base)

    def of(self, groups: Sequence[RolloutGroup], base: Fraction, *, step: int) -> list[Fraction]:
        """The level of every group.

        Args:
            base: K of the sources that have none of their own, at this step.
            step: rollout step, for the dithered ranks.
        """
        return [self._of_group(group, self.level_of(group.prompt.data_source, base), step) for group in groups]

    def _of_group(self, group: RolloutGroup, level: Fraction, step: int) -> Fraction:
        visit = verdicts(group)
        if visit.total == 0:
            return level
        if self.config.K_dither:
            rank = dithered_rank(level, visit.total).draw(seed=self.seed, step=step, group=group.index)
            return level_of_rank(rank, visit.total)
        if self.remembers:
            hard = self.gate.is_hard(visit.uid, wrong=visit.wrong, total=visit.total, level=level)
            # The lowest rank is hard for every group with a wrong answer, the highest easy for one with a right one.
            return level_of_rank(1 if hard else visit.total, visit.total)
        return level


def level_of_rank(rank: int, size: int) -> Fraction:
    """A level in (0, 1) whose rank in a group of `size` is `rank`."""
    return Fraction(2 * rank - 1, 2 * size)


def verdicts(group: RolloutGroup) -> Verdicts:
    """Wrong and all valid answers of a group."""
    right = [rollout.correctness > 0.5 for rollout in group.rollouts if rollout.valid]
    return Verdicts(uid=group.prompt.uid, wrong=len(right) - sum(right), total=len(right))
