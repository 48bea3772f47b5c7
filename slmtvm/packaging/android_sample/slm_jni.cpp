// What Model.kt calls: a model with one session, which writes the likeliest text.
#include <jni.h>

#include <cstdint>
#include <string>
#include <vector>

#include "slm.h"

namespace {

struct Held {
  slm_model *model = nullptr;
  slm_session *session = nullptr;
  slm_tokenizer *tokenizer = nullptr;

  ~Held() {
    slm_session_free(session);
    slm_tokenizer_close(tokenizer);
    slm_close(model);
  }
};

void fail(JNIEnv *env, const std::string &message) {
  if (jclass kind = env->FindClass("java/lang/IllegalStateException"))
    env->ThrowNew(kind, message.c_str());
}

bool ends(const slm_tokenizer *tokenizer, int32_t token) {
  for (const char *name : {"<|endoftext|>", "</s>", "<|im_end|>", "<eos>", "<|end|>"})
    if (slm_token_find(tokenizer, name, std::char_traits<char>::length(name)) == token) return true;
  return false;
}

// The text after `prompt`; an empty one and an exception where something failed.
std::string complete(JNIEnv *env, const Held &held, const std::string &prompt, int32_t most) {
  std::vector<uint64_t> work(slm_tokenize_bytes(held.tokenizer, prompt.size()) / 8 + 1);
  std::vector<int32_t> tokens(slm_context_size());
  int32_t count = slm_tokenize(held.tokenizer, prompt.data(), prompt.size(), 0, tokens.data(), nullptr,
                               tokens.size(), work.data(), work.size() * 8);
  if (count > int32_t(tokens.size())) return fail(env, "the prompt is too long"), "";
  if (count < 1 || slm_seek(held.session, 0) < 0 ||
      slm_eval(held.session, tokens.data(), size_t(count), nullptr) < 0)
    return fail(env, slm_last_error()), "";
  tokens.resize(size_t(count));
  std::vector<int32_t> written;
  slm_sampling greedy{};
  greedy.size = sizeof greedy;
  while (int32_t(written.size()) < most && slm_position(held.session) < slm_context_size()) {
    int32_t token = slm_sample(held.session, &greedy);
    if (token < 0) return fail(env, slm_last_error()), "";
    if (ends(held.tokenizer, token)) break;
    written.push_back(token);
    if (slm_eval(held.session, &token, 1, nullptr) < 0) return fail(env, slm_last_error()), "";
  }
  std::string text;
  slm_text_state state{};
  char part[256];
  for (int32_t got = SLM_MORE_TEXT; got & SLM_MORE_TEXT;) {
    got = slm_detokenize(held.tokenizer, &state, written.data(), written.size(), SLM_TEXT_ENDS, part,
                         sizeof part);
    if (got < 0) return fail(env, slm_last_error()), "";
    text.append(part, size_t(got & ~SLM_MORE_TEXT));
  }
  return text;
}

}  // namespace

extern "C" JNIEXPORT jlong JNICALL Java_org_slmtvm_Model_open(JNIEnv *env, jclass, jstring bundle,
                                                              jint threads) {
  const char *path = env->GetStringUTFChars(bundle, nullptr);
  if (!path) return 0;
  slm_options options{};
  options.size = sizeof options;
  options.threads = threads;
  auto held = new Held;
  bool opened = slm_open(path, &options, &held->model) == 0 &&
                slm_tokenizer_open(path, &held->tokenizer) == 0 &&
                slm_session_new(held->model, &held->session) == 0;
  env->ReleaseStringUTFChars(bundle, path);
  if (opened) return reinterpret_cast<jlong>(held);
  fail(env, slm_last_error());
  delete held;
  return 0;
}

extern "C" JNIEXPORT jbyteArray JNICALL Java_org_slmtvm_Model_complete(JNIEnv *env, jclass, jlong handle,
                                                                       jbyteArray prompt, jint most) {
  auto held = reinterpret_cast<Held *>(handle);
  if (!held) return fail(env, "the model is closed"), nullptr;
  std::string text(size_t(env->GetArrayLength(prompt)), 0);
  env->GetByteArrayRegion(prompt, 0, jsize(text.size()), reinterpret_cast<jbyte *>(text.data()));
  text = complete(env, *held, text, most);
  if (env->ExceptionCheck()) return nullptr;
  jbyteArray answer = env->NewByteArray(jsize(text.size()));
  if (answer)
    env->SetByteArrayRegion(answer, 0, jsize(text.size()), reinterpret_cast<const jbyte *>(text.data()));
  return answer;
}

extern "C" JNIEXPORT void JNICALL Java_org_slmtvm_Model_close(JNIEnv *, jclass, jlong handle) {
  delete reinterpret_cast<Held *>(handle);
}
