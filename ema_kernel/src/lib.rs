//! What Python sees of the kernel: two functions, and a check of everything that could go wrong in a call.
#![forbid(unsafe_code)]

pub mod ema;

/// Fused in-place exponential moving average and reset of parameters on the CPU.
#[cfg(feature = "python")]
#[pyo3::pymodule]
mod _ema_kernel {
    use std::fmt;
    use std::ops::Range;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use half::f16;
    use numpy::prelude::*;
    use numpy::{BorrowError, Element, PyArray1, PyReadonlyArray1, PyReadwriteArray1, PyUntypedArray};
    use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
    use pyo3::prelude::*;
    use pyo3::types::PySequence;

    use crate::ema;

    type Untyped<'a, 'py> = &'a Bound<'py, PyUntypedArray>;
    type Array<'a, 'py, T> = &'a Bound<'py, PyArray1<T>>;

    /// An argument, as messages call it.
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum Name {
        Ema,
        Init,
        Policy(usize),
    }

    impl fmt::Display for Name {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self {
                Self::Ema => f.write_str("ema"),
                Self::Init => f.write_str("init"),
                Self::Policy(index) => write!(f, "policies[{index}]"),
            }
        }
    }

    /// Calls `$function` for the element type of `$sample`, which is the first policy, or `ema` if there is none.
    macro_rules! by_dtype {
        ($sample:expr, $function:ident($($argument:expr),*)) => {{
            let (name, sample) = $sample?;
            if sample.cast::<PyArray1<f32>>().is_ok() {
                $function::<f32>($($argument),*)
            } else if sample.cast::<PyArray1<u16>>().is_ok() {
                $function::<u16>($($argument),*)
            } else if sample.cast::<PyArray1<f16>>().is_ok() {
                $function::<f16>($($argument),*)
            } else if sample.cast::<PyArray1<f64>>().is_ok() {
                $function::<f64>($($argument),*)
            } else {
                Err(PyTypeError::new_err(format!(
                    "{name} must be float32, float64, float16 or uint16 (the bits of bfloat16), not {}",
                    sample.dtype()
                )))
            }
        }};
    }

    /// Move an average towards the policy, in place: ema <- ema + (1 - decay) * (policy - ema).
    #[pyfunction]
    #[pyo3(signature = (ema, policies, decay, threads = 1))]
    fn update(
        ema: &Bound<'_, PyAny>,
        policies: &Bound<'_, PyAny>,
        decay: f64,
        threads: isize,
    ) -> PyResult<()> {
        let policies = &list(policies)?;
        if !(0.0..=1.0).contains(&decay) {
            return Err(PyValueError::new_err(format!("decay must lie between 0 and 1, not {decay}")));
        }
        let threads = positive(threads)?;
        by_dtype!(sample(policies, ema), update_as(ema, policies, decay, threads))
    }

    /// Restart from the average, in place: policy <- ema, rounded to its dtype, then ema <- init, of that dtype.
    #[pyfunction]
    #[pyo3(signature = (policies, ema, init, threads = 1))]
    fn reset(
        policies: &Bound<'_, PyAny>,
        ema: &Bound<'_, PyAny>,
        init: &Bound<'_, PyAny>,
        threads: isize,
    ) -> PyResult<()> {
        let policies = &list(policies)?;
        let threads = positive(threads)?;
        by_dtype!(sample(policies, ema), reset_as(policies, ema, init, threads))
    }

    fn update_as<P>(
        ema: &Bound<'_, PyAny>,
        policies: &[Bound<'_, PyAny>],
        decay: f64,
        threads: usize,
    ) -> PyResult<()>
    where
        P: ema::Element + Element,
        P::Average: Element,
    {
        let policies = typed::<P>(policies)?;
        let ema = as_long::<P, P::Average>(Name::Ema, ema, &policies)?;
        let changed = range(ema);
        for (i, policy) in policies.iter().enumerate() {
            apart(&mut [(changed.clone(), Name::Ema), (range(policy), Name::Policy(i))])?;
        }
        let mut ema_view = writable(Name::Ema, ema)?;
        let views = views(&policies, readable)?;
        let ema_slice = ema_view.as_slice_mut()?;
        let slices = views.iter().map(|view| view.as_slice()).collect::<Result<Vec<_>, _>>()?;
        ema.py().detach(|| {
            let _turn = take_turn();
            ema::update(ema_slice, &slices, decay, threads);
        });
        Ok(())
    }

    fn reset_as<P>(
        policies: &[Bound<'_, PyAny>],
        ema: &Bound<'_, PyAny>,
        init: &Bound<'_, PyAny>,
        threads: usize,
    ) -> PyResult<()>
    where
        P: ema::Element + Element,
        P::Average: Element,
    {
        let policies = typed::<P>(policies)?;
        let ema = as_long::<P, P::Average>(Name::Ema, ema, &policies)?;
        let init = as_long::<P, P>(Name::Init, init, &policies)?;
        let mut ranges = vec![(range(ema), Name::Ema), (range(init), Name::Init)];
        ranges.extend(policies.iter().enumerate().map(|(i, policy)| (range(policy), Name::Policy(i))));
        apart(&mut ranges)?;
        let (mut ema_view, init_view) = (writable(Name::Ema, ema)?, readable(Name::Init, init)?);
        let mut views = views(&policies, writable)?;
        let (ema_slice, init_slice) = (ema_view.as_slice_mut()?, init_view.as_slice()?);
        let mut slices = views.iter_mut().map(|view| view.as_slice_mut()).collect::<Result<Vec<_>, _>>()?;
        ema.py().detach(|| {
            let _turn = take_turn();
            ema::reset(&mut slices, ema_slice, init_slice, threads);
        });
        Ok(())
    }

    /// Two `.numpy()` views of one tensor look unrelated to rust-numpy, so whoever changes arrays without
    /// the GIL waits here for its turn.
    fn take_turn() -> MutexGuard<'static, ()> {
        static TURN: Mutex<()> = Mutex::new(());
        TURN.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn list<'py>(policies: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let Ok(sequence) = policies.cast::<PySequence>() else {
            return Err(PyTypeError::new_err(format!(
                "policies must be a list of NumPy arrays, not {}",
                policies.get_type().fully_qualified_name()?
            )));
        };
        sequence.to_list().map(|list| list.iter().collect())
    }

    fn positive(threads: isize) -> PyResult<usize> {
        match usize::try_from(threads) {
            Ok(threads @ 1..) => Ok(threads),
            _ => Err(PyValueError::new_err(format!("threads must be at least 1, not {threads}"))),
        }
    }

    fn sample<'a, 'py>(
        policies: &'a [Bound<'py, PyAny>],
        ema: &'a Bound<'py, PyAny>,
    ) -> PyResult<(Name, Untyped<'a, 'py>)> {
        match policies.first() {
            Some(policy) => Ok((Name::Policy(0), flat(Name::Policy(0), policy)?)),
            None => flat(Name::Ema, ema).map(|ema| (Name::Ema, ema)),
        }
    }

    fn flat<'a, 'py>(name: Name, array: &'a Bound<'py, PyAny>) -> PyResult<Untyped<'a, 'py>> {
        let Ok(array) = array.cast::<PyUntypedArray>() else {
            return Err(PyTypeError::new_err(format!(
                "{name} must be a NumPy array, not {}; of a CPU tensor pass tensor.numpy(), of a bfloat16 one \
                 tensor.view(torch.uint16).numpy()",
                array.get_type().fully_qualified_name()?
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
                "{name} must be contiguous and aligned, but it is a strided or shifted view; pass the whole array"
            )));
        }
        Ok(array)
    }

    /// The policies, if all have the element type of the first.
    fn typed<'a, 'py, P: Element>(policies: &'a [Bound<'py, PyAny>]) -> PyResult<Vec<Array<'a, 'py, P>>> {
        let mut arrays = Vec::with_capacity(policies.len());
        for (i, policy) in policies.iter().enumerate() {
            let array = flat(Name::Policy(i), policy)?;
            let Ok(array) = array.cast::<PyArray1<P>>() else {
                return Err(PyTypeError::new_err(format!(
                    "policies[{i}] must be {} as policies[0] is, not {}",
                    numpy::dtype::<P>(policy.py()),
                    array.dtype()
                )));
            };
            arrays.push(array);
        }
        Ok(arrays)
    }

    /// The named array, if it is as long as the policies together and its elements are of type T.
    fn as_long<'a, 'py, P: Element, T: Element>(
        name: Name,
        array: &'a Bound<'py, PyAny>,
        policies: &[Array<P>],
    ) -> PyResult<Array<'a, 'py, T>> {
        let array = flat(name, array)?;
        let Ok(array) = array.cast::<PyArray1<T>>() else {
            return Err(PyTypeError::new_err(format!(
                "{name} must be {} for {} policies, not {}",
                numpy::dtype::<T>(array.py()),
                numpy::dtype::<P>(array.py()),
                array.dtype()
            )));
        };
        let length: usize = policies.iter().map(|policy| policy.len()).sum();
        if array.len() != length {
            return Err(PyValueError::new_err(format!(
                "{name} must be as long as all policies together: {length} elements, not {}",
                array.len()
            )));
        }
        Ok(array)
    }

    fn range<T: Element>(array: Array<T>) -> Range<usize> {
        let start = array.data().addr();
        start..start + array.len() * size_of::<T>()
    }

    /// Sorted by address, arrays that share memory with any other share some with a neighbour.
    fn apart(ranges: &mut [(Range<usize>, Name)]) -> PyResult<()> {
        ranges.sort_unstable_by_key(|(range, _)| range.start);
        let mut filled = ranges.iter().filter(|(range, _)| !range.is_empty());
        let Some(mut last) = filled.next() else { return Ok(()) };
        for next in filled {
            if next.0.start < last.0.end {
                let (first, second) = (last.1.min(next.1), last.1.max(next.1));
                return Err(PyValueError::new_err(format!(
                    "{first} and {second} share memory; give each an array of its own"
                )));
            }
            last = next;
        }
        Ok(())
    }

    fn views<'a, 'py, T: Element, V>(
        policies: &[Array<'a, 'py, T>],
        view: impl Fn(Name, Array<'a, 'py, T>) -> PyResult<V>,
    ) -> PyResult<Vec<V>> {
        policies.iter().enumerate().map(|(i, policy)| view(Name::Policy(i), policy)).collect()
    }

    fn writable<'py, T: Element>(
        name: Name,
        array: Array<'_, 'py, T>,
    ) -> PyResult<PyReadwriteArray1<'py, T>> {
        array.try_readwrite().map_err(|error| match error {
            BorrowError::NotWriteable => PyValueError::new_err(format!(
                "{name} is changed in place but is read-only; pass a writeable array"
            )),
            _ => in_use(name),
        })
    }

    fn readable<'py, T: Element>(name: Name, array: Array<'_, 'py, T>) -> PyResult<PyReadonlyArray1<'py, T>> {
        array.try_readonly().map_err(|_| in_use(name))
    }

    fn in_use(name: Name) -> PyErr {
        PyBufferError::new_err(format!("{name} is in use by a call on another thread; let that return first"))
    }
}
