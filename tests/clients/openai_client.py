"""What users of the OpenAI client do, against a cluster on the demo model: openai_client.py http://host:port"""

import json
import sys
import time
import unittest
import urllib.error
import urllib.request

import openai

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


def wait_until_ready() -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{SERVER}/readyz", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"{SERVER} is not ready after 120 s: {error}")
            time.sleep(0.1)


class Client(unittest.TestCase):
    def setUp(self) -> None:
        self.client = openai.OpenAI(base_url=f"{SERVER}/v1", api_key="none", max_retries=0)

    def chat(self, **more):
        fields = {"model": MODEL, "messages": QUESTION, "temperature": 0, "reasoning_effort": "none"}
        return self.client.chat.completions.create(**{**fields, **more})

    def test_the_model_is_listed(self):
        self.assertEqual([model.id for model in self.client.models.list()], [MODEL])
        self.assertEqual(self.client.models.retrieve(MODEL).id, MODEL)

    def test_a_chat_is_answered(self):
        answer = self.chat()
        self.assertIn(ANSWER, answer.choices[0].message.content)
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)

    def test_a_stream_says_the_same(self):
        chunks = list(self.chat(stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        self.assertEqual(text, self.chat().choices[0].message.content)
        self.assertGreater(chunks[-1].usage.completion_tokens, 0)

    def test_reasoning_is_apart_and_nothing_leaks(self):
        message = self.chat(reasoning_effort="high").choices[0].message
        for text in (message.content, getattr(message, "reasoning", "")):
            self.assertNotIn("<|", text)

    def test_a_tool_is_called_and_its_result_taken(self):
        first = self.chat(messages=WEATHER, tools=TOOLS).choices[0]
        self.assertEqual(first.finish_reason, "tool_calls")
        call = first.message.tool_calls[0]
        self.assertEqual(call.function.name, "get_weather")
        self.assertIsInstance(json.loads(call.function.arguments)["city"], str)
        result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"temperature": 21, "sky": "clear"})}
        answer = self.chat(messages=[*WEATHER, first.message.model_dump(), result], tools=TOOLS)
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertTrue(answer.choices[0].message.content)

    def test_tool_calls_stream(self):
        with self.client.chat.completions.stream(
            model=MODEL, messages=WEATHER, tools=TOOLS, temperature=0, reasoning_effort="none"
        ) as stream:
            final = stream.get_final_completion()
        whole = self.chat(messages=WEATHER, tools=TOOLS)
        calls = [choice.message.tool_calls[0].function.arguments for choice in (final.choices[0], whole.choices[0])]
        self.assertEqual(calls[0], calls[1])

    def test_log_probabilities_add_up_to_the_text(self):
        choice = self.chat(logprobs=True, top_logprobs=3, max_tokens=8).choices[0]
        self.assertEqual(len(choice.logprobs.content), 8)
        for position in choice.logprobs.content:
            self.assertEqual(position.token, position.top_logprobs[0].token)
            self.assertLessEqual(position.logprob, 0)

    def test_the_same_seed_says_the_same(self):
        def ask(seed):
            answers = self.client.completions.create(
                model=MODEL, prompt="The", max_tokens=20, temperature=2, seed=seed, n=3
            )
            return [choice.text for choice in answers.choices]

        self.assertEqual(ask(7), ask(7))
        self.assertEqual(len(set(ask(7))), 3)

    def test_plain_completions(self):
        answer = self.client.completions.create(model=MODEL, prompt=["The", "A"], max_tokens=4, temperature=0, logprobs=1)
        self.assertEqual(len(answer.choices), 2)
        for choice in answer.choices:
            self.assertEqual("".join(choice.logprobs.tokens), choice.text)
        stream = self.client.completions.create(model=MODEL, prompt="The", max_tokens=4, temperature=0, stream=True)
        self.assertEqual("".join(chunk.choices[0].text for chunk in stream), answer.choices[0].text)

    def test_sampling_fields_work(self):
        self.assertNotIn(ANSWER, self.chat(max_tokens=12, extra_body={"bad_words": ["saturating"]}).choices[0].message.content)
        answer = self.chat(max_tokens=4, logit_bias={"600": 100}, presence_penalty=0.5, frequency_penalty=0.5)
        self.assertEqual(answer.choices[0].finish_reason, "length")

    def test_several_answers_share_their_prompt(self):
        answer = self.chat(n=3, temperature=1, seed=1, max_tokens=8)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2])
        again = self.chat(n=3, temperature=1, seed=1, max_tokens=8)
        self.assertEqual([c.message.content for c in answer.choices], [c.message.content for c in again.choices])
        self.assertLessEqual(answer.usage.prompt_tokens_details.cached_tokens, answer.usage.prompt_tokens)

    def test_errors_are_the_clients_own(self):
        with self.assertRaises(openai.NotFoundError):
            self.chat(model="gpt")
        with self.assertRaises(openai.BadRequestError) as refused:
            self.chat(frequency_penalty=3)
        self.assertEqual(refused.exception.param, "frequency_penalty")


wait_until_ready()
unittest.main()
