/* A CUDA driver without a device: what Triton asks of one before and at a launch. Everything
 * succeeds, nothing is run, and the last launch is kept to be read. */
#include <string.h>

#include "cuda.h"

enum { MOST = 24 };

struct launch {
  unsigned grid[3], threads, shared;
  void *stream, *function;
  unsigned long long arguments[MOST];
};

static struct launch last;
static int known; /* how many arguments the next launch has */

struct launch *last_launch(void) { return &last; }
void expect_arguments(int n) { known = n; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **arguments,
                          void **extra) {
  struct launch now = {{how->gridDimX, how->gridDimY, how->gridDimZ},
                       how->blockDimX,
                       how->sharedMemBytes,
                       how->hStream,
                       function};
  for (int i = 0; i < known && i < MOST; i++)
    memcpy(&now.arguments[i], arguments[i], sizeof now.arguments[i]);
  last = now;
  return CUDA_SUCCESS;
}

/* Every program that is loaded has a handle of its own. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  static unsigned long long loaded;
  *module = (CUmodule)++loaded;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

/* All memory is the device's, and limits are those of shared memory: 227 KiB a block. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *which, void **values,
                                CUdeviceptr address) {
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  *value = 227 << 10;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return cuCtxGetCurrent(context);
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "none";
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
