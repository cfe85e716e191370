// Lets tensors of a torch without CUDA pass for CUDA tensors in the library that this file is linked into (with
// -Bsymbolic, so that it sees these functions and nobody else does). The binding then runs as it is, up to the kernels.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

extern "C" {

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_stream(int32_t, StreamHandle* stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_stream(StreamHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError torch_stream_native_handle(StreamHandle, void** handle) {
  *handle = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
