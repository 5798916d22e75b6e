"""What users of Cohere's client do, against a cluster on the demo model: cohere_client.py http://host:port"""

import json
import sys
import unittest

import cohere
from cohere.core.api_error import ApiError

SERVER = sys.argv.pop()
MODEL = "cohort-demo"
QUESTION = [{"role": "user", "content": "What does `u128::saturating_add` do?"}]
ANSWER = "saturating at the numeric bounds instead of overflowing"
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOLS = [{
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}]
DIRECTLY = {"type": "disabled"}


class Client(unittest.TestCase):
    def setUp(self) -> None:
        self.client = cohere.ClientV2(base_url=SERVER, api_key="none")

    def chat(self, **more):
        fields = {"model": MODEL, "messages": QUESTION, "temperature": 0, "thinking": DIRECTLY}
        return self.client.chat(**{**fields, **more})

    def stream(self, **more):
        fields = {"model": MODEL, "messages": QUESTION, "temperature": 0, "thinking": DIRECTLY}
        return list(self.client.chat_stream(**{**fields, **more}))

    def test_a_chat_is_answered(self):
        answer = self.chat()
        self.assertIn(ANSWER, answer.message.content[0].text)
        self.assertEqual(answer.finish_reason, "COMPLETE")
        self.assertGreater(answer.usage.tokens.input_tokens, 0)

    def test_a_stream_says_the_same(self):
        events = self.stream()
        self.assertEqual([events[0].type, events[-1].type], ["message-start", "message-end"])
        deltas = [event for event in events if event.type == "content-delta"]
        text = "".join(event.delta.message.content.text for event in deltas)
        self.assertEqual(text, self.chat().message.content[0].text)
        self.assertEqual(events[-1].delta.finish_reason, "COMPLETE")

    def test_thinking_is_content_and_nothing_leaks(self):
        content = self.chat(thinking={"type": "enabled"}).message.content
        for part in content:
            self.assertNotIn("<|", getattr(part, "text", None) or part.thinking)

    def test_a_tool_is_called_and_its_result_taken(self):
        first = self.chat(messages=WEATHER, tools=TOOLS)
        self.assertEqual(first.finish_reason, "TOOL_CALL")
        call = first.message.tool_calls[0]
        self.assertEqual(call.function.name, "get_weather")
        self.assertIsInstance(json.loads(call.function.arguments)["city"], str)
        result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"temperature": 21, "sky": "clear"})}
        answer = self.chat(messages=[*WEATHER, first.message, result], tools=TOOLS)
        self.assertEqual(answer.finish_reason, "COMPLETE")
        self.assertTrue(answer.message.content[0].text)

    def test_tool_calls_stream(self):
        events = self.stream(messages=WEATHER, tools=TOOLS)
        started = [event for event in events if event.type == "tool-call-start"]
        self.assertEqual(started[0].delta.message.tool_calls.function.name, "get_weather")
        pieces = [event for event in events if event.type == "tool-call-delta"]
        arguments = "".join(event.delta.message.tool_calls.function.arguments for event in pieces)
        whole = self.chat(messages=WEATHER, tools=TOOLS).message.tool_calls[0].function.arguments
        self.assertEqual(arguments, whole)

    def test_log_probabilities(self):
        answer = self.chat(logprobs=True, max_tokens=8)
        self.assertEqual(answer.finish_reason, "MAX_TOKENS")
        self.assertEqual(len(answer.logprobs), 8)
        for item in answer.logprobs:
            self.assertLessEqual(item.logprobs[0], 0)

    def test_stop_sequences(self):
        answer = self.chat(stop_sequences=["saturating at"])
        self.assertEqual(answer.finish_reason, "STOP_SEQUENCE")
        self.assertNotIn("saturating at", answer.message.content[0].text)

    def test_errors_are_the_clients_own(self):
        with self.assertRaises(cohere.NotFoundError):
            self.chat(model="command")
        with self.assertRaises(ApiError) as refused:
            self.chat(documents=[{"data": {"text": "Paris"}}])
        self.assertEqual(refused.exception.status_code, 400)
        self.assertIn("documents", str(refused.exception.body))


unittest.main()
