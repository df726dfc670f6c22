"""Reads a KEDA ScaledObject with Prometheus triggers, as llm-d's autoscaling guide has it.

A file that is accepted here is one for KEDA too. What the local scaler has not is refused by name, never ignored.

Source: KEDA 2.21, the ScaledObject of keda.sh/v1alpha1 and its Prometheus scaler.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from llmtrace.autoscale.hpa import DOWN_WINDOW_S, SCALE_DOWN, SCALE_UP, TOLERANCE, Policy, Rules, Spec, Target
from llmtrace.errors import UserError

KIND = "ScaledObject"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


def _positive(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError("must be a number above 0")
    return value


def _boolean(value: object) -> object:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


class PrometheusMetadata(_Part):
    """A query that gives one number.

    Without a value the metric is 0, or is missing where ``ignore_null_values`` is false.
    """

    server_address: str = Field(pattern=r"^https?://")
    query: str = Field(min_length=1)
    threshold: Annotated[float, AfterValidator(_positive)]
    ignore_null_values: Annotated[bool, BeforeValidator(_boolean)] = True


class Trigger(_Part):
    """A metric to scale on."""

    type: Literal["prometheus"]
    name: str = ""
    metric_type: Literal["AverageValue", "Value"] = "AverageValue"
    metadata: PrometheusMetadata


class PolicySpec(_Part):
    """A scaling policy of the HPA's behaviour."""

    type: Literal["Pods", "Percent"]
    value: int
    period_seconds: int


class RulesSpec(_Part):
    """The HPA's behaviour in one direction; what is left out has Kubernetes' default."""

    stabilization_window_seconds: int | None = None
    select_policy: Literal["Max", "Min", "Disabled"] = "Max"
    policies: list[PolicySpec] | None = None
    tolerance: float | None = None

    def rules(self, default: Rules) -> Rules:
        """The rules, with what is left out from ``default``."""
        policies = default.policies
        if self.policies is not None:
            policies = tuple(Policy(kind=p.type, value=p.value, period_s=p.period_seconds) for p in self.policies)
        window = self.stabilization_window_seconds
        return Rules(
            window_s=default.window_s if window is None else window,
            policies=policies,
            select=self.select_policy,
            tolerance=TOLERANCE if self.tolerance is None else self.tolerance,
        )


class Behavior(_Part):
    """The HPA's behaviour."""

    scale_up: RulesSpec = RulesSpec()
    scale_down: RulesSpec = RulesSpec(stabilization_window_seconds=int(DOWN_WINDOW_S))


class HpaConfig(_Part):
    """What KEDA hands on to the HPA that it makes."""

    name: str = ""
    behavior: Behavior = Behavior()


class Advanced(_Part):
    """KEDA's further settings."""

    horizontal_pod_autoscaler_config: HpaConfig = HpaConfig()


class ScaleTarget(_Part):
    """What is scaled; only its name counts here."""

    name: str = Field(min_length=1)
    api_version: str = ""
    kind: str = ""


class ScaledObjectSpec(_Part):
    """The spec. KEDA scales to zero by itself, the HPA from one on; the local scaler does what the HPA does."""

    scale_target_ref: ScaleTarget
    min_replica_count: int = Field(default=1, ge=1)
    max_replica_count: int = Field(default=100, ge=1)
    polling_interval: int = Field(default=30, ge=1)
    advanced: Advanced = Advanced()
    triggers: list[Trigger] = Field(min_length=1)


class Metadata(BaseModel):
    """Name and whatever else Kubernetes has there."""

    model_config = ConfigDict(frozen=True)
    name: str = Field(min_length=1)


class ScaledObject(_Part):
    """The file."""

    api_version: Literal["keda.sh/v1alpha1"]
    kind: Literal["ScaledObject"]
    metadata: Metadata
    spec: ScaledObjectSpec

    def triggers(self) -> dict[str, Trigger]:
        """The triggers by name; one without a name is called after its place."""
        return {t.name or f"s{index}-prometheus": t for index, t in enumerate(self.spec.triggers)}

    def hpa(self) -> Spec:
        """What the HPA that KEDA makes of it is told."""
        behavior = self.spec.advanced.horizontal_pod_autoscaler_config.behavior
        return Spec(
            minimum=self.spec.min_replica_count,
            maximum=self.spec.max_replica_count,
            targets=tuple(
                Target(name=name, kind=t.metric_type, value=t.metadata.threshold) for name, t in self.triggers().items()
            ),
            up=behavior.scale_up.rules(SCALE_UP),
            down=behavior.scale_down.rules(SCALE_DOWN),
        )


def load(path: Path) -> ScaledObject:
    """Read a file; raises UserError with one sentence where it cannot be read or says something impossible."""
    try:
        content: Any = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"the ScaledObject {path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"the ScaledObject {path} is no YAML: {' '.join(str(error).split())}") from None
    try:
        found = ScaledObject.model_validate(content)
        found.hpa()
    except ValidationError as error:
        raise UserError(f"the ScaledObject {path} is wrong at {_said(error)}") from None
    if found.spec.max_replica_count < found.spec.min_replica_count:
        raise UserError(
            f"the ScaledObject {path}: maxReplicaCount is {found.spec.max_replica_count}, less than minReplicaCount "
            f"{found.spec.min_replica_count}"
        )
    if len(found.triggers()) < len(found.spec.triggers):
        raise UserError(f"the ScaledObject {path} has two triggers of the same name")
    return found


def _said(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the top level"
    if first["type"] == "extra_forbidden":
        return f"{where}: the local scaler has no such setting; remove it"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"
