// A libcuda for Triton's own launcher to end in: it runs nothing, and notes what is launched.
#include <cuda.h>
#include <string.h>

#undef cuCtxGetDevice
#undef cuCtxGetLimit
#undef cuPointerGetAttribute
#undef cuStreamIsCapturing

// The launches since `noted` was set to 0: grid, block, shared memory, stream, function, arguments.
unsigned char notes[1 << 16];
int noted = 0;
int sizes[512];  // of the arguments, in bytes: a launch does not tell
int arguments = 0;

static size_t handle = 4096;

static void note(const void* from, int size) {
  if (noted + size > (int)sizeof(notes)) size = 0;
  memcpy(notes + noted, from, size);
  noted += size;
}

CUresult cuLaunchKernelEx(
    const CUlaunchConfig* config, CUfunction function, void** values, void** extra) {
  unsigned shape[] = {config->gridDimX,       config->gridDimY,  config->gridDimZ,
                      config->blockDimX,      config->blockDimY, config->blockDimZ,
                      config->sharedMemBytes, config->numAttrs};
  note(shape, sizeof(shape));
  note(&config->hStream, sizeof(config->hStream));
  note(&function, sizeof(function));
  for (int i = 0; i < arguments; ++i) note(values[i], sizes[i]);
  return CUDA_SUCCESS;
}

// What the driver would refuse is refused; else the map holds its arguments.
CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
    const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* step,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill) {
  if ((size_t)address % 16 != 0 || rank > 2) return CUDA_ERROR_INVALID_VALUE;
  cuuint64_t found[12] = {type, swizzle, promotion, fill, (size_t)address, rank};
  for (cuuint32_t i = 0; i < rank; ++i) {
    const int is_pitch = i + 1 < rank;
    if (size[i] == 0 || size[i] > 1ull << 32 || box[i] == 0 || box[i] > 256 || step[i] != 1 ||
        (is_pitch && (stride[i] % 16 != 0 || stride[i] >> 40 != 0))) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    found[6 + 3 * i] = size[i];
    found[7 + 3 * i] = box[i];
    found[8 + 3 * i] = is_pitch ? stride[i] : 0;
  }
  memset(map, 0, sizeof(*map));
  memcpy(map, found, sizeof(found));
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(value, &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)++handle;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)++handle;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 232448;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "refused by the libcuda of the tests";
  return CUDA_SUCCESS;
}
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return cuCtxGetCurrent(context);
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(
    int* clusters, CUfunction function, const CUlaunchConfig* config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}
