//! What Python sees of the kernel: two functions, and a check of everything that could go wrong in a call.
#![forbid(unsafe_code)]

pub mod ema;

/// Fused in-place exponential moving average and reset over flat CPU buffers.
#[cfg(feature = "python")]
#[pyo3::pymodule]
mod _ema_kernel {
    use std::ops::Range;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use half::f16;
    use numpy::prelude::*;
    use numpy::{BorrowError, Element, PyArray1, PyReadonlyArray1, PyReadwriteArray1, PyUntypedArray};
    use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
    use pyo3::prelude::*;

    use crate::ema;

    type Untyped<'a, 'py> = &'a Bound<'py, PyUntypedArray>;
    type Array<'a, 'py, T> = &'a Bound<'py, PyArray1<T>>;

    /// Calls `$function` with the policy as an array of its own element type.
    macro_rules! by_dtype {
        ($policy:ident, $function:ident($($argument:expr),*)) => {
            if let Ok(policy) = $policy.cast::<PyArray1<f32>>() {
                $function(policy, $($argument),*)
            } else if let Ok(policy) = $policy.cast::<PyArray1<u16>>() {
                $function(policy, $($argument),*)
            } else if let Ok(policy) = $policy.cast::<PyArray1<f16>>() {
                $function(policy, $($argument),*)
            } else if let Ok(policy) = $policy.cast::<PyArray1<f64>>() {
                $function(policy, $($argument),*)
            } else {
                Err(PyTypeError::new_err(format!(
                    "policy must be float32, float64, float16 or uint16 (the bits of bfloat16), not {}",
                    $policy.dtype()
                )))
            }
        };
    }

    /// Move an average towards the policy, in place: ema <- ema + (1 - decay) * (policy - ema).
    #[pyfunction]
    #[pyo3(signature = (ema, policy, decay, threads = 1))]
    fn update(ema: &Bound<'_, PyAny>, policy: &Bound<'_, PyAny>, decay: f64, threads: isize) -> PyResult<()> {
        let (ema, policy) = (flat("ema", ema)?, flat("policy", policy)?);
        if !(0.0..=1.0).contains(&decay) {
            return Err(PyValueError::new_err(format!("decay must lie between 0 and 1, not {decay}")));
        }
        let threads = positive(threads)?;
        by_dtype!(policy, update_as(ema, decay, threads))
    }

    /// Restart from the average, in place: policy <- ema, rounded to its dtype, then ema <- init.
    #[pyfunction]
    #[pyo3(signature = (policy, ema, init, threads = 1))]
    fn reset(
        policy: &Bound<'_, PyAny>,
        ema: &Bound<'_, PyAny>,
        init: &Bound<'_, PyAny>,
        threads: isize,
    ) -> PyResult<()> {
        let (policy, ema, init) = (flat("policy", policy)?, flat("ema", ema)?, flat("init", init)?);
        let threads = positive(threads)?;
        by_dtype!(policy, reset_as(ema, init, threads))
    }

    fn update_as<P>(policy: Array<P>, ema: Untyped, decay: f64, threads: usize) -> PyResult<()>
    where
        P: ema::Element + Element,
        P::Average: Element,
    {
        let ema = average("ema", ema, policy)?;
        apart(&[("ema", range(ema)), ("policy", range(policy))])?;
        let (mut ema_view, policy_view) = (writable("ema", ema)?, readable("policy", policy)?);
        let (ema, policy) = (ema_view.as_slice_mut()?, policy_view.as_slice()?);
        policy_view.py().detach(|| {
            let _turn = take_turn();
            ema::update(ema, policy, decay, threads);
        });
        Ok(())
    }

    fn reset_as<P>(policy: Array<P>, ema: Untyped, init: Untyped, threads: usize) -> PyResult<()>
    where
        P: ema::Element + Element,
        P::Average: Element,
    {
        let (ema, init) = (average("ema", ema, policy)?, average("init", init, policy)?);
        apart(&[("policy", range(policy)), ("ema", range(ema)), ("init", range(init))])?;
        let (mut policy_view, mut ema_view) = (writable("policy", policy)?, writable("ema", ema)?);
        let init_view = readable("init", init)?;
        let (policy, ema) = (policy_view.as_slice_mut()?, ema_view.as_slice_mut()?);
        let init = init_view.as_slice()?;
        init_view.py().detach(|| {
            let _turn = take_turn();
            ema::reset(policy, ema, init, threads);
        });
        Ok(())
    }

    /// Two `.numpy()` views of one tensor look unrelated to rust-numpy, so whoever changes buffers without
    /// the GIL waits here for its turn.
    fn take_turn() -> MutexGuard<'static, ()> {
        static TURN: Mutex<()> = Mutex::new(());
        TURN.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flat<'a, 'py>(name: &str, buffer: &'a Bound<'py, PyAny>) -> PyResult<Untyped<'a, 'py>> {
        let Ok(array) = buffer.cast::<PyUntypedArray>() else {
            return Err(PyTypeError::new_err(format!(
                "{name} must be a NumPy array, not {}; of a CPU tensor pass tensor.numpy(), of a bfloat16 one \
                 tensor.view(torch.uint16).numpy()",
                buffer.get_type().fully_qualified_name()?
            )));
        };
        if array.ndim() != 1 {
            return Err(PyValueError::new_err(format!(
                "{name} must have one dimension, not {}; pass a flat view of it",
                array.ndim()
            )));
        }
        if !array.is_c_contiguous() || !array.is_aligned() {
            return Err(PyValueError::new_err(format!(
                "{name} must be contiguous and aligned, but it is a strided or shifted view; pass the whole buffer"
            )));
        }
        Ok(array)
    }

    fn positive(threads: isize) -> PyResult<usize> {
        match usize::try_from(threads) {
            Ok(threads @ 1..) => Ok(threads),
            _ => Err(PyValueError::new_err(format!("threads must be at least 1, not {threads}"))),
        }
    }

    /// The named buffer, if it has the policy's length and the dtype in which the policy is averaged.
    fn average<'a, 'py, P>(
        name: &str,
        buffer: Untyped<'a, 'py>,
        policy: Array<P>,
    ) -> PyResult<Array<'a, 'py, P::Average>>
    where
        P: ema::Element + Element,
        P::Average: Element,
    {
        let Ok(array) = buffer.cast::<PyArray1<P::Average>>() else {
            return Err(PyTypeError::new_err(format!(
                "{name} must be {} for a {} policy, not {}",
                numpy::dtype::<P::Average>(buffer.py()),
                policy.dtype(),
                buffer.dtype()
            )));
        };
        if array.len() != policy.len() {
            return Err(PyValueError::new_err(format!(
                "{name} must be as long as policy: {} elements, not {}",
                policy.len(),
                array.len()
            )));
        }
        Ok(array)
    }

    fn range<T: Element>(array: Array<T>) -> Range<usize> {
        let start = array.data().addr();
        start..start + array.len() * size_of::<T>()
    }

    fn apart(buffers: &[(&str, Range<usize>)]) -> PyResult<()> {
        for (i, (name, a)) in buffers.iter().enumerate() {
            for (other, b) in &buffers[..i] {
                if a.start < b.end && b.start < a.end {
                    return Err(PyValueError::new_err(format!(
                        "{other} and {name} share memory; give each a buffer of its own"
                    )));
                }
            }
        }
        Ok(())
    }

    fn writable<'py, T: Element>(
        name: &str,
        array: Array<'_, 'py, T>,
    ) -> PyResult<PyReadwriteArray1<'py, T>> {
        array.try_readwrite().map_err(|error| match error {
            BorrowError::NotWriteable => PyValueError::new_err(format!(
                "{name} is changed in place but is read-only; pass a writeable array"
            )),
            _ => in_use(name),
        })
    }

    fn readable<'py, T: Element>(name: &str, array: Array<'_, 'py, T>) -> PyResult<PyReadonlyArray1<'py, T>> {
        array.try_readonly().map_err(|_| in_use(name))
    }

    fn in_use(name: &str) -> PyErr {
        PyBufferError::new_err(format!("{name} is in use by a call on another thread; let that return first"))
    }
}
