"""Steps of the engine with mixture-of-experts models: one span for each sampled step and rank.

The engine core counts its forward passes and describes each batch (:mod:`batch`); the description rides on vLLM's own
SchedulerOutput to the workers, which measure the phases of the step (:mod:`worker`, :mod:`recorder`) and hand the
result to a thread that makes the span (:mod:`sender`). The ids of a step's trace and spans follow from the group of
ranks, the step's number and the rank (:mod:`ids`): so the spans of all ranks meet in one trace, and a request can link
to its steps, without a message between the ranks.

For other models nothing of it is loaded.
"""
