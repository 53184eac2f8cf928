// The PyTorch ops of fagen, and the short way from Python to a kernel.
//
// forward, forward_lse and forward_out find their kernel by table.h, fill its params and launch, or let
// PyTorch compute (op `fallback`). No CUDA header: streams and devices go through c10.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/randint.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "gradients.h"  // pasted in by binding.py, and what it includes

namespace fagen {

// ---- forward --------------------------------------------------------------------------------------------------------

void launch_forward(const Entry& entry, const Call& c, const Tensor& out, const Tensor* lse) {
  fagen_forward_params p{};
  p.q = rows_of(c.q, c);
  p.k = rows_of(c.k, c);
  p.v = rows_of(c.v, c);
  p.o = rows_of(out, c), p.o.data = out.data_ptr();  // which makes a lazy copy a real one
  if (lse) p.lse = lse->data_ptr<float>();
  put_problem(p, c);
  launch(entry, c, p);
}

Tensor new_out(const Call& c) {
  std::array<int64_t, 4> sizes = {c.q.size(0), c.q.size(1), c.q.size(2), c.v.size(3)};
  return at::empty(sizes, c.q.options());
}

Tensor new_lse(const Call& c) {
  return at::empty({c.q.size(0), c.q.size(c.head()), c.q.size(c.row())}, c.q.options().dtype(at::kFloat));
}

std::tuple<Tensor, Tensor> by_torch(const Call& c, bool want_lse) {
  static const auto op = handle<Fallback>("fagen::fallback");
  return call_op(op, c, want_lse);
}

Tensor forward(const Call& c) {
  const Entry entry = entry_for(c, {});
  if (!entry.launch) return std::get<0>(by_torch(c, false));
  Tensor out = new_out(c);
  launch_forward(entry, c, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor> forward_lse(const Call& c) {
  const Entry entry = entry_for(c, {.lse = true});
  if (!entry.launch) return by_torch(c, true);
  Tensor out = new_out(c), lse = new_lse(c);
  launch_forward(entry, c, out, &lse);
  return {out, lse};
}

// Fills `out`; returns the LSE, or an empty tensor if it is not wanted.
Tensor forward_out(const Call& c, bool want_lse, Tensor& out) {
  refuse_overlap(c, out);
  const Entry entry = entry_for(c, {.out = &out, .lse = want_lse});
  if (!entry.launch) {
    auto [result, lse] = by_torch(c, want_lse);
    out.copy_(result);
    return want_lse ? lse : at::empty({0}, lse.options());
  }
  Tensor lse = want_lse ? new_lse(c) : at::empty({0}, c.q.options().dtype(at::kFloat));
  launch_forward(entry, c, out, want_lse ? &lse : nullptr);
  return lse;
}

// ---- autograd -------------------------------------------------------------------------------------------------------

// Whether a gradient is wanted of the output, or forward mode put a tangent on an input.
bool differentiated(const Call& c, const Tensor* out = nullptr) {
  const bool overwritten = out && ((at::GradMode::is_enabled() && out->requires_grad()) || out->_fw_grad(0).defined());
  return overwritten || wants_gradient(c) || has_tangent(c);
}

std::tuple<Tensor, Tensor> with_gradients(const Call& c, bool want_lse) {
  if (!gradients_are_ours(c)) return by_torch(c, want_lse);
  const auto both = Attention::apply(c.q, c.k, c.v, c);
  return {both[0], both[1]};
}

Tensor forward_autograd(const Call& c) {
  static const auto op = handle<Forward>("fagen::forward");
  if (differentiated(c)) return std::get<0>(with_gradients(c, false));
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_op(op, c);
}

std::tuple<Tensor, Tensor> forward_lse_autograd(const Call& c) {
  static const auto op = handle<ForwardLse>("fagen::forward_lse");
  if (differentiated(c)) return with_gradients(c, true);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_op(op, c);
}

Tensor forward_out_autograd(const Call& c, bool want_lse, Tensor& out) {
  static const auto op = handle<ForwardOut>("fagen::forward_out");
  if (differentiated(c, &out)) {
    auto [result, lse] = by_torch(c, want_lse);
    out.copy_(result);
    return want_lse ? lse : at::empty({0}, lse.options());
  }
  const at::AutoDispatchBelowAutograd guard;
  return call_op(op, c, want_lse, out);
}

// Whoever saved `out` for a gradient must learn that it has changed.
Tensor forward_out_in_place(const Call& c, bool want_lse, Tensor& out) {
  static const auto op = handle<ForwardOut>("fagen::forward_out");
  out.unsafeGetTensorImpl()->bump_version();
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_op(op, c, want_lse, out);
}

// ---- from Python ----------------------------------------------------------------------------------------------------

// A plain, dense tensor: no subclass whose __torch_function__ would want to see the call.
bool plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return false;
  const Tensor& t = THPVariable_Unpack(object);
  return t.layout() == at::kStrided && !t.is_nested() && !t.is_quantized();
}

// One that has kernels; the dispatcher would send a mixture to whichever device it ranks highest.
bool one_device(const Call& c) {
  const at::Device device = c.q.device();
  return (device.is_cpu() || device.is_cuda()) &&
         c.all_tensors([device](const Tensor& t) { return t.device() == device; });
}

bool window_bound(PyObject* object, int64_t& bound) {
  if (object == Py_None) return bound = -1, true;
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  bound = PyLong_AsLongLongAndOverflow(object, &overflow);
  return !overflow && bound >= -1 && bound <= INT32_MAX;
}

bool number(PyObject* object, double& value) {
  if (PyFloat_CheckExact(object)) return value = PyFloat_AS_DOUBLE(object), true;
  if (PyLong_CheckExact(object)) return value = PyLong_AsDouble(object), !PyErr_Occurred();
  return false;
}

bool in_functorch() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Seed and offset by PyTorch's generator of the device; as ops/attention/dropout.draw.
Tensor draw(const at::Device& device) {
  return at::randint(0, INT64_MAX, {2}, at::TensorOptions().dtype(at::kLong).device(device));
}

// An output of sdpa lies in memory as its query does: batches, heads and rows one inside the other in the same order.
// None where the query is expanded, or torch.func's, whose outputs are no memory of their own.
std::optional<Tensor> out_like_query(const Tensor& q, const Tensor& v) {
  if (q.dim() != 4 || v.dim() != 4) return std::nullopt;
  if (in_functorch()) return std::nullopt;
  std::array<int64_t, 4> sizes = {q.size(0), q.size(1), q.size(2), v.size(3)}, strides = {0, 0, 0, 1};
  std::array<int, 3> order = {0, 1, 2};
  std::stable_sort(order.begin(), order.end(), [&q](int a, int b) { return q.stride(a) < q.stride(b); });
  int64_t reach = sizes[3];
  for (const int i : order) {
    if (q.stride(i) == 0) return std::nullopt;
    strides[i] = reach;
    reach *= sizes[i];
  }
  return at::empty_strided(sizes, strides, q.options());
}

bool maybe_tensor(PyObject* object, MaybeTensor& t) {
  if (object == Py_None) return true;
  if (!plain(object)) return false;
  t = THPVariable_Unpack(object);
  return true;
}

bool may_be_filled(const Tensor& out, const Tensor& q) {
  return out.device() == q.device() && (!out.is_inference() || c10::InferenceMode::is_enabled());
}

PyObject* pair(Tensor&& a, Tensor&& b) {
  THPObjectPtr first(THPVariable_Wrap(std::move(a))), second(THPVariable_Wrap(std::move(b)));
  return PyTuple_Pack(2, first.get(), second.get());
}

// The call with its GIL released, by the op that fits what is wanted back.
PyObject* answer(const Call& c, bool want_lse) {
  static const auto op = handle<Forward>("fagen::forward");
  static const auto op_lse = handle<ForwardLse>("fagen::forward_lse");
  if (want_lse) {
    std::tuple<Tensor, Tensor> both;
    {
      const pybind11::gil_scoped_release release;
      both = call_op(op_lse, c);
    }
    return pair(std::move(std::get<0>(both)), std::move(std::get<1>(both)));
  }
  Tensor out;
  {
    const pybind11::gil_scoped_release release;
    out = call_op(op, c);
  }
  return THPVariable_Wrap(std::move(out));
}

PyObject* answer_into(const Call& c, bool want_lse, Tensor out) {
  static const auto op = handle<ForwardOut>("fagen::forward_out");
  Tensor lse;
  {
    const pybind11::gil_scoped_release release;
    lse = call_op(op, c, want_lse, out);
  }
  return want_lse ? pair(std::move(out), std::move(lse)) : THPVariable_Wrap(std::move(out));
}

// The arguments of fagen.attention, in the order in which api.py hands them over.
#define FAGEN_HANDED(X) \
  X(q)                  \
  X(k)                  \
  X(v)                  \
  X(layout)             \
  X(causal)             \
  X(window) X(intervals) X(softcap) X(alibi_slopes) X(scale) X(return_lse) X(out) X(deterministic) X(dropout_p)

struct Handed {
#define FAGEN_OBJECT(name) PyObject* name;
  FAGEN_HANDED(FAGEN_OBJECT)
#undef FAGEN_OBJECT
};
constexpr Py_ssize_t kHanded = sizeof(Handed) / sizeof(PyObject*);

std::string doc_of(const char* name) {
#define FAGEN_NAME(name) ", " #name
  return name + ("(" + std::string(FAGEN_HANDED(FAGEN_NAME)).substr(2)) + ")";
#undef FAGEN_NAME
}

// A call of the usual kind; None for everything else, which the caller then handles at leisure. `like_query`: the
// output lies in memory as q does.
PyObject* fast_call(PyObject* const* args, Py_ssize_t count, bool like_query) {
  HANDLE_TH_ERRORS
  if (count != kHanded) Py_RETURN_NONE;
  Handed a;
  std::memcpy(&a, args, sizeof a);
  if (!plain(a.q) || !plain(a.k) || !plain(a.v) || !PyUnicode_Check(a.layout)) Py_RETURN_NONE;
  const bool bhsd = PyUnicode_CompareWithASCIIString(a.layout, "bhsd") == 0;
  if (!bhsd && PyUnicode_CompareWithASCIIString(a.layout, "bshd") != 0) Py_RETURN_NONE;
  if (!PyBool_Check(a.causal) || !PyTuple_CheckExact(a.window) || PyTuple_GET_SIZE(a.window) != 2) Py_RETURN_NONE;
  int64_t left = -1, right = -1;
  if (!window_bound(PyTuple_GET_ITEM(a.window, 0), left) || !window_bound(PyTuple_GET_ITEM(a.window, 1), right))
    Py_RETURN_NONE;
  double softcap = 0, scale = 1;
  if (!number(a.softcap, softcap) || (a.scale != Py_None && !number(a.scale, scale))) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  if (!(scale >= kLeast) || !held(softcap, scale)) Py_RETURN_NONE;
  double dropout = 0;
  if (!number(a.dropout_p, dropout) || !(dropout >= 0 && dropout <= 1) || (dropout > 0 && in_functorch())) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  MaybeTensor intervals, alibi_slopes, rng;
  if (!maybe_tensor(a.intervals, intervals) || !maybe_tensor(a.alibi_slopes, alibi_slopes)) Py_RETURN_NONE;
  if (!PyBool_Check(a.return_lse) || (a.out != Py_None && !plain(a.out))) Py_RETURN_NONE;
  if (!PyBool_Check(a.deterministic)) Py_RETURN_NONE;
  const bool causal = a.causal == Py_True, want_lse = a.return_lse == Py_True;
  const Tensor* out = a.out == Py_None ? nullptr : &THPVariable_Unpack(a.out);
  const Call call{
      .q = THPVariable_Unpack(a.q),
      .k = THPVariable_Unpack(a.k),
      .v = THPVariable_Unpack(a.v),
      .intervals = intervals,
      .alibi_slopes = alibi_slopes,
      .bhsd = bhsd,
      .causal = causal,
      .window_left = left,
      .window_right = causal ? 0 : right,
      .softcap = softcap,
      .scale = a.scale == Py_None ? std::nullopt : std::optional<double>(scale),
      .deterministic = a.deterministic == Py_True,
      .dropout = dropout,
      .rng = rng,
  };
  if (!one_device(call)) Py_RETURN_NONE;
  const bool trained = !out && wants_gradient(call) && !has_tangent(call);
  if (!trained && differentiated(call, out)) Py_RETURN_NONE;
  if ((out && !may_be_filled(*out, call.q)) || at::impl::torch_function_mode_enabled()) Py_RETURN_NONE;
  const Tensor& q = call.q;
  const bool as_named = q.dim() == 4 && q.stride(0) >= q.stride(1) && q.stride(1) >= q.stride(2);
  std::optional<Tensor> room;
  if (out) room = *out;
  if (!out && like_query && !as_named) {
    if (!trained) room = out_like_query(q, call.v);
    if (!room) Py_RETURN_NONE;
  }
  if (dropout > 0) rng = draw(q.device());  // last: who handles the call instead draws as well
  return room ? answer_into(call, want_lse, std::move(*room)) : answer(call, want_lse);
  END_HANDLE_TH_ERRORS
}

PyObject* fast_attention(PyObject*, PyObject* const* args, Py_ssize_t count) { return fast_call(args, count, false); }
PyObject* fast_sdpa(PyObject*, PyObject* const* args, Py_ssize_t count) { return fast_call(args, count, true); }

PyObject* forget_all(PyObject*, PyObject*) {
  forget();
  Py_RETURN_NONE;
}

bool words_of(PyObject* list, std::vector<int64_t>& words) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) words.push_back(PyLong_AsLongLong(PyList_GET_ITEM(list, i)));
  return !PyErr_Occurred();
}

// nearest(plan, sizes): the index of the row of a plan that is the nearest to a size, and the address of the kernel
// that find() answers with, None where Python must be asked; for tests.
PyObject* nearest_row(PyObject*, PyObject* args) {
  PyObject *plan = nullptr, *sizes = nullptr;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &plan, &PyList_Type, &sizes)) return nullptr;
  std::vector<int64_t> words, s;
  if (!words_of(plan, words) || !words_of(sizes, s)) return nullptr;
  if (words.size() < kPlanWords || s.size() != 7) return PyErr_Format(PyExc_ValueError, "a plan and seven sizes");
  const Plan known = plan_of(words.data(), words.size());
  const Sizes asked{s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
  const auto row = static_cast<long long>(known.nearest(asked));
  const Answer& answer = known.find(asked);
  if (!answer.known) return Py_BuildValue("LO", row, Py_None);
  return Py_BuildValue("LL", row, static_cast<long long>(reinterpret_cast<intptr_t>(answer.entry.launch)));
}

using FastCall = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef fast_method(const char* name, FastCall* function) {
  static std::list<std::string> docs;  // which Python points to
  docs.push_back(doc_of(name));
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
          docs.back().c_str()};
}

PyMethodDef methods[] = {
    fast_method("attention", fast_attention),
    fast_method("sdpa", fast_sdpa),
    {"forget", forget_all, METH_NOARGS, nullptr},
    {"nearest", nearest_row, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "kernel", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace fagen

TORCH_LIBRARY(fagen, m) {
  const auto define = [&m, arguments = fagen::schema()](const std::string& name, const std::string& rest) {
    m.def((name + "(" + arguments + rest).c_str());
  };
  define("forward", ") -> Tensor");
  define("forward_lse", ") -> (Tensor, Tensor)");
  define("forward_out", ", bool want_lse, Tensor(a!) out) -> Tensor");
  define("backward", ", Tensor out, Tensor lse, Tensor dout, Tensor? dlse) -> (Tensor, Tensor, Tensor)");
  // implemented by runtime/python_ops.py
  define("resolve", ", Tensor? out, bool want_lse) -> int[]");
  define("resolve_backward", ") -> int[]");
  define("fallback", ", bool want_lse) -> (Tensor, Tensor)");
  define("fallback_backward", ", Tensor out, Tensor lse, Tensor dout, Tensor? dlse) -> (Tensor, Tensor, Tensor)");
  define("refuse_overlap", ", Tensor out) -> ()");
  m.def("fail(str what, str numbers) -> ()");
  m.def("refuse(str what, str numbers) -> ()");
}

#define FAGEN_REGISTER(m)                                      \
  m.impl("forward", &fagen::AsOp<fagen::forward>::op);         \
  m.impl("forward_lse", &fagen::AsOp<fagen::forward_lse>::op); \
  m.impl("forward_out", &fagen::AsOp<fagen::forward_out>::op); \
  m.impl("backward", &fagen::AsOp<fagen::backward>::op)

TORCH_LIBRARY_IMPL(fagen, CPU, m) { FAGEN_REGISTER(m); }
TORCH_LIBRARY_IMPL(fagen, CUDA, m) { FAGEN_REGISTER(m); }
TORCH_LIBRARY_IMPL(fagen, Autograd, m) {
  m.impl("forward", &fagen::AsOp<fagen::forward_autograd>::op);
  m.impl("forward_lse", &fagen::AsOp<fagen::forward_lse_autograd>::op);
  m.impl("forward_out", &fagen::AsOp<fagen::forward_out_autograd>::op);
  m.impl("backward", &fagen::AsOp<fagen::backward_autograd>::op);
}
TORCH_LIBRARY_IMPL(fagen, ADInplaceOrView, m) { m.impl("forward_out", &fagen::AsOp<fagen::forward_out_in_place>::op); }

PyMODINIT_FUNC PyInit_kernel() { return PyModule_Create(&fagen::module); }
