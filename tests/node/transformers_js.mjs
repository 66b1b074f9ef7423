// What transformers.js makes of a repository: node transformers_js.mjs FOLDER DTYPE IMAGE LABEL ... prints JSON.
import {
  AutoModel, AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, env, pipeline,
} from "@huggingface/transformers";

const [folder, dtype, image, ...labels] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder.replace(/[^/]+$/, "");
const name = folder.split("/").pop(), options = { dtype };
const said = [];
console.warn = (...words) => said.push(words.join(" "));

const tokenizer = await AutoTokenizer.from_pretrained(name);
const processor = await AutoProcessor.from_pretrained(name);
const texts = tokenizer(labels, { padding: true, truncation: true });
const images = await processor(await RawImage.read(image));
const rows = (tensor) => tensor.tolist();

const textModel = await CLIPTextModelWithProjection.from_pretrained(name, options);
const visionModel = await CLIPVisionModelWithProjection.from_pretrained(name, options);
const autoModel = await AutoModel.from_pretrained(name, { ...options, model_file_name: "text_model" });
const answer = {
  input_ids: texts.input_ids.tolist().map((row) => row.map(Number)),
  pixel_values: images.pixel_values.tolist(),
  text_embeds: rows((await textModel(texts)).text_embeds),
  auto_text_embeds: rows((await autoModel({ input_ids: texts.input_ids, attention_mask: texts.attention_mask })).text_embeds),
  image_embeds: rows((await visionModel(images)).image_embeds),
};
try {
  const classify = await pipeline("zero-shot-image-classification", name, options);
  answer.classified = await classify(image, labels, { hypothesis_template: "{}" });
} catch (error) {
  answer.refused = error.message;
}
console.log(JSON.stringify({ ...answer, said }));
