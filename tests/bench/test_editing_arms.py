"""What the arms of the editing benchmark are made of; no engine."""

from bench.editing_arms import Known
from vapr.llm.request import Reply, Request


def test_a_model_that_has_answered_is_asked_once_by_any_number_of_jobs():
    class Engine:
        name = revision = engine = "engine"
        num_gpus, settings, asked = 0, {}, 0

        def ask(self, requests):
            self.asked += len(requests)
            return [Reply(request.messages[0]["content"]) for request in requests]

    engine = Engine()
    known = Known(engine)
    for job in ("first", "second"):
        requests = [Request(({"content": text},), None, 0, 9, 0.0, asked_for=job) for text in "abc"]
        assert [reply.text for reply in known.ask(requests)] == ["a", "b", "c"]
    assert engine.asked == len(known.requests) == 3
