// What users of the OpenAI client for Node do, against a cluster on the demo model: SERVER=http://host:port node --test
import assert from 'node:assert/strict';
import test from 'node:test';
import OpenAI from 'openai';

const client = new OpenAI({ baseURL: `${process.env.SERVER}/v1`, apiKey: 'none', maxRetries: 0 });
const model = 'cohort-demo';
const question = [{ role: 'user', content: 'What does `u128::saturating_add` do?' }];
const answer = 'saturating at the numeric bounds instead of overflowing';
const fields = { model, messages: question, temperature: 0, reasoning_effort: 'none' };
const weather = [{ role: 'user', content: 'What is the weather in Paris?' }];
const tools = [
  {
    type: 'function',
    function: {
      name: 'get_weather',
      description: 'Current weather of a city.',
      parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
    },
  },
];

test('a chat is answered, at once and as a stream', async () => {
  const whole = await client.chat.completions.create(fields);
  assert.ok(whole.choices[0].message.content.includes(answer));
  let text = '';
  let usage;
  const stream = await client.chat.completions.create({ ...fields, stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? '';
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);
});

test('a tool is called, also in a stream', async () => {
  const whole = await client.chat.completions.create({ ...fields, messages: weather, tools });
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(whole.choices[0].finish_reason, 'tool_calls');
  assert.equal(typeof JSON.parse(call.function.arguments).city, 'string');
  const runner = client.chat.completions.stream({ ...fields, messages: weather, tools });
  const final = await runner.finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
});

test('a stream that is left goes on nowhere', async () => {
  const stream = await client.chat.completions.create({ ...fields, stream: true });
  for await (const chunk of stream) {
    assert.ok(chunk.id);
    break;
  }
  assert.ok((await client.chat.completions.create(fields)).choices[0].message.content.includes(answer));
});

test('errors are the client’s own', async () => {
  await assert.rejects(client.chat.completions.create({ ...fields, model: 'gpt' }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ ...fields, top_p: 2 }), (error) => {
    return error instanceof OpenAI.BadRequestError && error.param === 'top_p';
  });
});
