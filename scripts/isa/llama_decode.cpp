// Evaluates tokens one by one, to their logits, between marks that the counting plugin reads.
//
//   llama_decode MODEL.gguf REPACK FLASH_ATTENTION PROMPT_TOKENS COUNT
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

namespace {

enum { MARK_BEGIN = 9001, MARK_END = 9002, CONTEXT = 1024, FIRST_TOKEN = 1000 };

void eval(llama_context *context, std::vector<llama_token> tokens) {
  if (llama_decode(context, llama_batch_get_one(tokens.data(), (int32_t)tokens.size())) == 0) return;
  std::fprintf(stderr, "llama_decode failed\n");
  std::exit(3);
}

}  // namespace

int main(int, char **argv) {
  llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
  llama_model_params model_params = llama_model_default_params();
  model_params.use_extra_bufts = std::atoi(argv[2]) != 0;
  llama_model *model = llama_model_load_from_file(argv[1], model_params);
  llama_context_params params = llama_context_default_params();
  params.n_ctx = CONTEXT;
  params.n_threads = params.n_threads_batch = 1;
  params.flash_attn_type =
      std::atoi(argv[3]) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  llama_context *context = model ? llama_init_from_model(model, params) : nullptr;
  if (!context) return 2;

  std::vector<llama_token> prompt(std::atoi(argv[4]));
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = FIRST_TOKEN + (llama_token)i;
  eval(context, prompt);
  // One token first: the graph of a single row is planned when it is first run.
  eval(context, {prompt[0]});
  syscall(MARK_BEGIN);
  for (int i = std::atoi(argv[5]); i > 0; --i) eval(context, {prompt[0]});
  syscall(MARK_END);
}
