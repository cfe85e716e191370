// Runs cases of block attention on the host: `runner CASES OUTPUTS`, formats as in runner.py. `runner plan NUMBERS`
// prints the launch plan of a shape.

#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "block_attention.h"
#include "launch_plan.h"

namespace {

using namespace slipstream::cuda;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<unsigned char, Free>;

// Heap blocks of exactly the right size, so that nothing beyond them is read or written unnoticed.
Memory allocate(size_t bytes, int fill) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes ? bytes : 1)) host_shim::fail("out of memory");
  std::memset(memory, fill, bytes);
  return Memory(static_cast<unsigned char*>(memory));
}

template <typename T>
T read(std::istream& file) {
  T value;
  file.read(reinterpret_cast<char*>(&value), sizeof value);
  if (!file) host_shim::fail("the cases end early");
  return value;
}

std::vector<int64_t> read_numbers(std::istream& file, int count) {
  std::vector<int64_t> numbers;
  for (int i = 0; i < count; ++i) numbers.push_back(read<int64_t>(file));
  return numbers;
}

Rows read_rows(std::istream& file, const std::vector<Memory>& storages, int64_t element_size) {
  const std::vector<int64_t> n = read_numbers(file, 5);  // storage, offset and strides in elements
  return {storages[n[0]].get() + n[1] * element_size, n[2], n[3], n[4]};
}

struct Indices {
  const int32_t* data;
  int64_t stride;
};

Indices read_indices(std::istream& file, const std::vector<Memory>& storages) {
  const std::vector<int64_t> n = read_numbers(file, 3);
  return {reinterpret_cast<const int32_t*>(storages[n[0]].get()) + n[1], n[2]};
}

void run_case(std::istream& file, std::ostream& outputs) {
  const std::vector<int64_t> n = read_numbers(file, 13);
  const DType dtype = static_cast<DType>(n[0]);
  const int64_t element_size = dtype == DType::kFloat32 ? 4 : 2;
  host_shim::device.multiprocessors = static_cast<int>(n[9]);
  host_shim::device.copies_late = n[10];
  host_shim::device.poison = static_cast<int>(n[11]);
  BlockAttentionParams params{};
  params.scale = static_cast<float>(read<double>(file));
  std::vector<Memory> storages;
  for (int64_t i = 0; i < n[12]; ++i) {
    const int64_t bytes = read<int64_t>(file);
    storages.push_back(allocate(bytes, 0));
    file.read(reinterpret_cast<char*>(storages.back().get()), bytes);
  }
  params.query = read_rows(file, storages, element_size);
  params.block_key = read_rows(file, storages, element_size);
  params.block_value = read_rows(file, storages, element_size);
  params.key_cache = read_rows(file, storages, element_size);
  params.value_cache = read_rows(file, storages, element_size);
  const Indices tables = read_indices(file, storages), lengths = read_indices(file, storages),
                visible = read_indices(file, storages);
  params.block_tables = tables.data;
  params.block_tables_stride = tables.stride;
  params.context_lens = lengths.data;
  params.visible = visible.data;
  params.visible_stride = visible.stride;
  int32_t* const sizes[] = {&params.requests, &params.queries,  &params.slots,     &params.heads,
                            &params.kv_heads, &params.head_dim, &params.max_pages, &params.page_size};
  for (int i = 0; i < 8; ++i) *sizes[i] = static_cast<int32_t>(n[1 + i]);
  const AttentionShape shape{n[1], n[2], n[4], n[5], n[6], n[7], n[8], element_size};
  const int64_t bytes = n[1] * n[2] * n[4] * n[6] * element_size;
  const Memory output = allocate(bytes, 0xff);  // NaN in every format
  const Memory scratch = allocate(plan_launch(shape, 1).scratch_floats * sizeof(float), 0xff);
  params.output = output.get();
  params.scratch = reinterpret_cast<float*>(scratch.get());
  const cudaError_t error = launch_block_attention(params, dtype, nullptr);
  const int64_t code = error;
  outputs.write(reinterpret_cast<const char*>(&code), sizeof code);
  outputs.write(reinterpret_cast<const char*>(output.get()), bytes);
  outputs.flush();
}

void print_plan(char** numbers) {
  int64_t n[9];
  for (int i = 0; i < 9; ++i) n[i] = std::stoll(numbers[i]);
  const LaunchPlan plan = plan_launch({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]}, n[8]);
  const SharedLayout layout = shared_layout(static_cast<int>(n[4] * n[7]));
  const int64_t values[] = {plan.chunks,         plan.row_tiles,       plan.blocks_x,
                            plan.blocks_y,       plan.shared_bytes,    plan.combine_blocks,
                            plan.scratch_floats, plan.scratch_outputs, layout.tokens};
  for (const int64_t value : values) std::printf("%lld ", static_cast<long long>(value));
  std::printf("\n");
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 11 && std::string(arguments[1]) == "plan") {
    print_plan(arguments + 2);
    return 0;
  }
  if (count == 3 && std::string(arguments[1]) == "chunks") {
    const int chunks = chunk_count(std::stoll(arguments[2]));
    for (int chunk = 0; chunk <= chunks; ++chunk) std::printf("%lld ", static_cast<long long>(chunk_begin(chunk)));
    std::printf("\n");
    return 0;
  }
  if (count != 3) host_shim::fail("expected the files of cases and of outputs");
  std::ifstream cases(arguments[1], std::ios::binary);
  std::ofstream outputs(arguments[2], std::ios::binary);
  if (!cases || !outputs) host_shim::fail("cannot open the files");
  for (int64_t left = read<int64_t>(cases); left > 0; --left) run_case(cases, outputs);
  return 0;
}
