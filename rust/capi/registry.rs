//! Shared objects by their ids: any thread may look one up, use it, and take it out while others use it.

use std::collections::HashMap;
use std::sync::PoisonError;

use crate::sync::RwLock;

/// `T` is a reference that counts: a clone keeps the object alive.
#[derive(Debug)]
pub(super) struct Registry<T>(RwLock<HashMap<u64, T>>);

impl<T: Clone> Registry<T> {
    pub(super) fn new() -> Self {
        Self(RwLock::new(HashMap::new()))
    }

    /// The id is nobody's yet.
    pub(super) fn insert(&self, id: u64, object: T) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(id, object);
    }

    /// What lives under that id.
    pub(super) fn get(&self, id: u64) -> Option<T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Takes it out, for one caller alone. Who drops it does so outside the lock: the last reference may free much.
    pub(super) fn remove(&self, id: u64) -> Option<T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&id)
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::cell::Cell;
    use loom::sync::Arc;
    use loom::thread;

    use crate::sync::{AtomicU64, Ordering};

    const ID: u64 = 7;

    /// Says when it dies, and asks for the lock as it does so: under the lock it would wait for itself.
    struct Object {
        registry: std::sync::Weak<Registry<Arc<Self>>>,
        /// Written by its maker and by its end, without a lock.
        state: Cell<u64>,
        deaths: Arc<AtomicU64>,
    }

    impl Drop for Object {
        fn drop(&mut self) {
            self.state.set(0);
            self.deaths.fetch_add(1, Ordering::Relaxed);
            if let Some(registry) = self.registry.upgrade() {
                assert!(registry.get(ID).is_none());
            }
        }
    }

    /// A registry with one object, and the count of its deaths.
    fn registry() -> (std::sync::Arc<Registry<Arc<Object>>>, Arc<AtomicU64>) {
        let (registry, deaths) = (std::sync::Arc::new(Registry::new()), Arc::new(AtomicU64::new(0)));
        let object = Object {
            registry: std::sync::Arc::downgrade(&registry),
            state: Cell::new(0),
            deaths: deaths.clone(),
        };
        object.state.set(1);
        registry.insert(ID, Arc::new(object));
        (registry, deaths)
    }

    #[test]
    fn an_object_outlives_the_call_that_found_it() {
        loom::model(|| {
            let (registry, deaths) = registry();
            let call = thread::spawn({
                let (registry, deaths) = (registry.clone(), deaths.clone());
                move || {
                    let found = registry.get(ID);
                    if let Some(object) = &found {
                        assert_eq!(object.state.get(), 1);
                        assert_eq!(deaths.load(Ordering::Relaxed), 0);
                    }
                }
            });
            drop(registry.remove(ID));
            assert!(registry.get(ID).is_none());
            call.join().unwrap();
            assert_eq!(deaths.load(Ordering::Relaxed), 1);
        });
    }

    #[test]
    fn one_of_two_destroys_wins() {
        loom::model(|| {
            let (registry, deaths) = registry();
            let destroy =
                |registry: &Registry<Arc<Object>>| u64::from(registry.remove(ID).map(drop).is_some());
            let other = thread::spawn({
                let registry = registry.clone();
                move || destroy(&registry)
            });
            let won = destroy(&registry) + other.join().unwrap();
            assert_eq!((won, deaths.load(Ordering::Relaxed)), (1, 1));
        });
    }

    #[test]
    fn what_another_thread_has_made_is_found_whole() {
        loom::model(|| {
            let empty = std::sync::Arc::new(Registry::<Arc<Cell<u64>>>::new());
            let maker = thread::spawn({
                let registry = empty.clone();
                move || {
                    let made = Arc::new(Cell::new(0));
                    made.set(1);
                    registry.insert(ID, made);
                }
            });
            // As by a caller that hands handles on without any order of its own.
            if let Some(found) = empty.get(ID) {
                assert_eq!(found.get(), 1);
            }
            maker.join().unwrap();
        });
    }
}
