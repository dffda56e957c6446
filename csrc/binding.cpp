// What was built and what this processor offers; holds no operation.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

#define MLLMCL_TEXT_(x) #x
#define MLLMCL_TEXT(x) MLLMCL_TEXT_(x)

std::string compiler() {
#if defined(__clang__)
  return "clang " MLLMCL_TEXT(__clang_major__) "." MLLMCL_TEXT(__clang_minor__);
#elif defined(__GNUC__)
  return "gcc " MLLMCL_TEXT(__GNUC__) "." MLLMCL_TEXT(__GNUC_MINOR__);
#else
  return "unknown";
#endif
}

// The clone of the C++ kernels that the loader picks on this processor.
std::string used() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? "x86-64-v4 (avx512)" : v3 ? "x86-64-v3 (avx2, fma)" : "baseline";
#else
  return "baseline";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["stable_abi_target"] = MLLMCL_ABI_TARGET;
#if defined(__x86_64__) && defined(__GNUC__)
  info["instruction_sets_built"] = py::make_tuple("baseline", "x86-64-v3", "x86-64-v4");
#else
  info["instruction_sets_built"] = py::make_tuple("baseline");
#endif
  info["instruction_set_used"] = used();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info, "Compiler, ABI target, instruction sets built and used."); }
