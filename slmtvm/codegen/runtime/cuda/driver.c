/* Finding the CUDA driver. */
#include "driver.h"

#include <dlfcn.h>

#include "../error.h"
#include "../slm.h"

int32_t slm_cuda_driver_open(slm_cuda_driver *driver) {
  driver->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!driver->library)
    return slm_fail(SLM_ERR_DEVICE, "no CUDA driver here: %s", dlerror());
#define LOAD(name, args)                                                                    \
  *(void **)&driver->name = dlsym(driver->library, #name);                                  \
  if (!driver->name) {                                                                      \
    slm_cuda_driver_close(driver);                                                          \
    return slm_fail(SLM_ERR_DEVICE, "the CUDA driver lacks %s: it is older than 11.4", #name); \
  }
  SLM_CUDA_FUNCTIONS(LOAD)
#undef LOAD
  return slm_cuda_check(driver, driver->cuInit(0), "starting the CUDA driver");
}

void slm_cuda_driver_close(slm_cuda_driver *driver) {
  if (driver->library) dlclose(driver->library);
  driver->library = NULL;
}

int32_t slm_cuda_check(const slm_cuda_driver *driver, int code, const char *what) {
  enum { OUT_OF_MEMORY = 2 };
  const char *name = "unknown error";
  if (!code) return SLM_OK;
  driver->cuGetErrorName(code, &name);
  return slm_fail(code == OUT_OF_MEMORY ? SLM_ERR_MEMORY : SLM_ERR_DEVICE, "%s: %s (%d)", what,
                  name, code);
}
