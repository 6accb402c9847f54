// Drives one of the providers' JavaScript clients. Argument: a name of `clients`, below.
// A line of standard input is a task {url, key, model, prompt, stream, times, tools, schema}, a line of standard output
// what came of it, {said: [...]}: one {objects, text} or {error: {status, message}} for each of `times` requests at once.

import { createInterface } from "node:readline";

const which = process.argv[2];
const TOOL = { type: "object", properties: { city: { type: "string" } } };

const clients = {
  async openai(task) {
    const { default: OpenAI } = await import("openai");
    const sdk = new OpenAI({ baseURL: `${task.url}/v1`, apiKey: task.key, maxRetries: 0 });
    const ask = { model: task.model, messages: [{ role: "user", content: task.prompt }], stream: task.stream };
    if (task.tools) ask.tools = [{ type: "function", function: { name: "weather", description: "Weather", parameters: TOOL } }];
    if (task.schema)
      ask.response_format = { type: "json_schema", json_schema: { name: "trip", schema: task.schema, strict: true } };
    return async () => {
      const objects = await all(await sdk.chat.completions.create(ask), task.stream);
      const parts = objects.flatMap((o) => o.choices ?? []).map((c) => (task.stream ? c.delta : c.message));
      return { objects, text: parts.map((p) => p?.content ?? "").join("") };
    };
  },

  async responses(task) {
    const { default: OpenAI } = await import("openai");
    const sdk = new OpenAI({ baseURL: `${task.url}/v1`, apiKey: task.key, maxRetries: 0 });
    const ask = { model: task.model, input: task.prompt, stream: task.stream };
    if (task.tools)
      ask.tools = [{ type: "function", name: "weather", description: "Weather", strict: false, parameters: TOOL }];
    if (task.schema) ask.text = { format: { type: "json_schema", name: "trip", schema: task.schema, strict: true } };
    return async () => {
      const objects = await all(await sdk.responses.create(ask), task.stream);
      if (!task.stream) return { objects, text: objects[0].output_text };
      const deltas = objects.filter((o) => o.type === "response.output_text.delta");
      return { objects, text: deltas.map((o) => o.delta).join("") };
    };
  },

  async completions(task) {
    const { default: OpenAI } = await import("openai");
    const sdk = new OpenAI({ baseURL: `${task.url}/v1`, apiKey: task.key, maxRetries: 0 });
    return async () => {
      const answer = await sdk.completions.create({ model: task.model, prompt: task.prompt, stream: task.stream });
      const objects = await all(answer, task.stream);
      return { objects, text: objects.flatMap((o) => o.choices).map((c) => c.text ?? "").join("") };
    };
  },

  async embeddings(task) {
    const { default: OpenAI } = await import("openai");
    const sdk = new OpenAI({ baseURL: `${task.url}/v1`, apiKey: task.key, maxRetries: 0 });
    const ask = { model: task.model, input: task.inputs ?? task.prompt };
    return async () => ({ objects: [await sdk.embeddings.create(ask)], text: "" });
  },

  async anthropic(task) {
    const { default: Anthropic } = await import("@anthropic-ai/sdk");
    const sdk = new Anthropic({ baseURL: task.url, apiKey: task.key, maxRetries: 0 });
    const ask = { model: task.model, max_tokens: 8000, messages: [{ role: "user", content: task.prompt }] };
    if (task.tools) ask.tools = [{ name: "weather", description: "Weather", input_schema: TOOL }];
    if (task.schema) ask.output_config = { format: { type: "json_schema", schema: task.schema } };
    return async () => {
      if (!task.stream) {
        const message = await sdk.messages.create(ask);
        return { objects: [message], text: message.content.map((b) => b.text ?? "").join("") };
      }
      const message = await sdk.messages.stream(ask).finalMessage(); // the helper that checks the order of events
      return { objects: [message], text: message.content.map((b) => b.text ?? "").join("") };
    };
  },

  async gemini(task) {
    const { GoogleGenAI } = await import("@google/genai");
    const sdk = new GoogleGenAI({ apiKey: task.key, httpOptions: { baseUrl: task.url, retryOptions: { attempts: 1 } } });
    const config = {};
    if (task.tools)
      config.tools = [{ functionDeclarations: [{ name: "weather", description: "Weather", parametersJsonSchema: TOOL }] }];
    if (task.schema) Object.assign(config, { responseMimeType: "application/json", responseJsonSchema: task.schema });
    const ask = { model: task.model, contents: task.prompt, config };
    return async () => {
      const answer = task.stream
        ? await sdk.models.generateContentStream(ask)
        : await sdk.models.generateContent(ask);
      const objects = await all(answer, task.stream);
      const parts = objects.flatMap((o) => o.candidates?.[0]?.content?.parts ?? []);
      const plain = objects.map(({ sdkHttpResponse, responseId, ...rest }) => rest);
      return { objects: plain, text: parts.map((p) => p.text ?? "").join("") };
    };
  },

  async "gemini-embeddings"(task) {
    const { GoogleGenAI } = await import("@google/genai");
    const sdk = new GoogleGenAI({ apiKey: task.key, httpOptions: { baseUrl: task.url, retryOptions: { attempts: 1 } } });
    return async () => {
      const said = await sdk.models.embedContent({ model: task.model, contents: task.inputs ?? task.prompt });
      const { sdkHttpResponse, ...rest } = said;
      return { objects: [rest], text: "" };
    };
  },

  async "ollama-embeddings"(task) {
    const { Ollama } = await import("ollama");
    const sdk = new Ollama({ host: task.url, headers: { Authorization: `Bearer ${task.key}` } });
    return async () => {
      const { total_duration, load_duration, ...rest } = await sdk.embed({ model: task.model, input: task.inputs ?? task.prompt });
      return { objects: [rest], text: "" };
    };
  },

  async ollama(task) {
    const { Ollama } = await import("ollama");
    const sdk = new Ollama({ host: task.url, headers: { Authorization: `Bearer ${task.key}` } });
    const ask = { model: task.model, messages: [{ role: "user", content: task.prompt }], stream: task.stream };
    if (task.tools) ask.tools = [{ type: "function", function: { name: "weather", description: "Weather", parameters: TOOL } }];
    if (task.schema) ask.format = task.schema;
    return async () => {
      const objects = await all(await sdk.chat(ask), task.stream);
      const plain = objects.map(({ created_at, ...rest }) => rest);
      return { objects: plain, text: objects.map((o) => o.message?.content ?? "").join("") };
    };
  },
};

async function all(answer, stream) {
  if (!stream) return [answer];
  const objects = [];
  for await (const item of answer) objects.push(item);
  return objects;
}

async function attempt(ask) {
  try {
    return await ask();
  } catch (error) {
    return { error: { status: error.status ?? error.status_code ?? null, message: String(error.message ?? error) } };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const task = JSON.parse(line);
  const ask = await clients[which](task);
  const said = await Promise.all(Array.from({ length: task.times ?? 1 }, () => attempt(ask)));
  console.log(JSON.stringify({ said }));
}
