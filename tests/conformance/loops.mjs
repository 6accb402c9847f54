// Drives one JavaScript client that asks more than once for a task; the twin of loops.py.

import { createInterface } from "node:readline";
import { z } from "zod";

const which = process.argv[2];
const SYSTEM = "You are a helpful assistant.";
const Trip = z.object({ city: z.string(), days: z.number().int() });
const City = z.object({ city: z.string() });
const weather = async ({ city }) => `It is warm in ${city}.`;

async function aiSdk(task, model) {
  const { generateText, streamText, tool, isStepCount, Output } = await import("ai");
  const ask = { model, system: SYSTEM, prompt: task.prompt, maxRetries: 0 };
  if (task.loop) {
    ask.tools = { weather: tool({ description: "How the weather is", inputSchema: City, execute: weather }) };
    ask.stopWhen = isStepCount(4);
  }
  if (task.schema) ask.output = Output.object({ schema: Trip });
  if (task.stream) {
    let failed;
    const { textStream } = streamText({ ...ask, onError: ({ error }) => (failed = error) });
    let said = "";
    for await (const piece of textStream) said += piece;
    if (failed) throw failed;
    return said;
  }
  const answer = await generateText(ask);
  return task.schema ? JSON.stringify(answer.output) : answer.text;
}

async function openaiOfAiSdk(task) {
  const { createOpenAI } = await import("@ai-sdk/openai");
  return createOpenAI({ baseURL: `${task.url}/v1`, apiKey: task.key });
}

const clients = {
  "ai-sdk-chat": async (task) => aiSdk(task, (await openaiOfAiSdk(task)).chat(task.model)),
  "ai-sdk-responses": async (task) => aiSdk(task, (await openaiOfAiSdk(task)).responses(task.model)),

  async "ai-sdk-anthropic"(task) {
    const { createAnthropic } = await import("@ai-sdk/anthropic");
    return aiSdk(task, createAnthropic({ baseURL: `${task.url}/v1`, apiKey: task.key })(task.model));
  },

  async "langchain-js"(task) {
    const { ChatOpenAI } = await import("@langchain/openai");
    const { HumanMessage, SystemMessage, ToolMessage } = await import("@langchain/core/messages");
    const { tool } = await import("@langchain/core/tools");
    const configuration = { baseURL: `${task.url}/v1` };
    const chat = new ChatOpenAI({ model: task.model, apiKey: task.key, maxRetries: 0, configuration });
    const said = [new SystemMessage(SYSTEM), new HumanMessage(task.prompt)];
    if (task.schema) return JSON.stringify(await chat.withStructuredOutput(Trip, { name: "trip" }).invoke(said));
    if (task.stream) {
      let text = "";
      for await (const piece of await chat.stream(said)) text += piece.text;
      return text;
    }
    const telling = tool(weather, { name: "weather", description: "How the weather is", schema: City });
    const bound = task.loop ? chat.bindTools([telling]) : chat;
    for (;;) {
      const answer = await bound.invoke(said);
      if (!answer.tool_calls?.length) return answer.text;
      said.push(answer);
      for (const call of answer.tool_calls)
        said.push(new ToolMessage({ content: await weather(call.args), tool_call_id: call.id }));
    }
  },

  async mastra(task) {
    const { Agent } = await import("@mastra/core/agent");
    const { createTool } = await import("@mastra/core/tools");
    const telling = createTool({ id: "weather", description: "How the weather is", inputSchema: City, execute: weather });
    const agent = new Agent({
      id: "helper",
      name: "helper",
      instructions: SYSTEM,
      model: (await openaiOfAiSdk(task)).chat(task.model),
      tools: task.loop ? { weather: telling } : {},
      maxRetries: 0,
    });
    if (task.stream) {
      const answer = await agent.stream(task.prompt);
      let said = "";
      for await (const piece of answer.textStream) said += piece;
      if (answer.error) throw answer.error;
      return said;
    }
    const more = task.schema ? { structuredOutput: { schema: Trip } } : {};
    const answer = await agent.generate(task.prompt, { maxSteps: 4, ...more });
    if (answer.error) throw answer.error;
    return task.schema ? JSON.stringify(answer.object) : answer.text;
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const task = JSON.parse(line);
  let said;
  try {
    said = { objects: [], text: await clients[which](task) };
  } catch (error) {
    said = { error: { status: error.statusCode ?? error.status ?? null, message: String(error.message ?? error) } };
  }
  console.log(JSON.stringify({ said: [said] }));
}
