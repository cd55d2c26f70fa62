"""After how much a run stops, until somebody raises the limit.

`UsageLimits` that are passed to a run would be stored with it, and a run that has reached them
could never go on. The limits here are this process's own. They are checked inside the model step,
so a stored answer is used whatever the limits are.
"""

import math
from contextvars import ContextVar
from dataclasses import dataclass

from pydantic_ai import AgentRunError, RunContext, RunUsage
from pydantic_ai.capabilities import AbstractCapability, WrapRunHandler
from pydantic_ai.run import AgentRunResult

_usage: ContextVar[RunUsage] = ContextVar("usage")


class LimitReachedError(AgentRunError):
    """The run has used as much as it may.

    Pydantic AI's own `UsageLimitExceeded` would add an advice on `UsageLimits`, which are stored.
    """


@dataclass(frozen=True)
class Limit:
    """How much of one thing a run may use."""

    value: float = math.inf
    setting: str = "the limit"
    """What a person changes to raise the limit: for error texts."""


@dataclass(frozen=True)
class Limits:
    """What a run may use. A run that has reached a limit makes no further model request."""

    cost: Limit = Limit()
    """US dollars. An answer whose price is not known costs nothing. May be passed by one answer."""
    requests: Limit = Limit()
    """Answers of the model that the run has used. Failed attempts do not count."""
    tokens: Limit = Limit()
    """Tokens of all requests and answers together. May be passed by one answer."""

    def refuse_further_request(self) -> None:
        """Raise `LimitReachedError` if the run that is executed here has reached a limit."""
        usage = _usage.get()
        cost, requests, tokens = usage.cost or 0, usage.requests, usage.total_tokens
        for reached, limit, used in (
            (cost > self.cost.value, self.cost, f"it has cost {cost:.4f} US$"),
            (requests >= self.requests.value, self.requests, f"it has used {requests} answers"),
            (tokens > self.tokens.value, self.tokens, f"it has used {tokens} tokens"),
        ):
            if reached:
                raise LimitReachedError(f"{used}: raise {limit.setting} ({limit.value})")


class LimitsOfTheProcess(AbstractCapability[None]):
    """Let the limits of this process take the place of Pydantic AI's own limit of 50 requests.

    That limit holds for each run without `UsageLimits`, and no setting raises it.
    """

    async def wrap_run(
        self, ctx: RunContext[None], *, handler: WrapRunHandler
    ) -> AgentRunResult[object]:
        """Lift the limit of this run, and let its model steps see what the run has used."""
        if ctx.usage_limits is not None:
            ctx.usage_limits.request_limit = None
        # If this is a sub-agent, its caller goes on: Pydantic AI sets the variable back for it.
        _usage.set(ctx.usage)
        return await handler()
