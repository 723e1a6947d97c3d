//! What QEMU does with memory that each of its processes would pay for, done once or not at all.
//!
//! All of this is QEMU's own code and data, found by name among the symbols that it exports for its
//! modules. A QEMU that has them not, and a program that is no QEMU, is left as it is.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    mem::transmute,
};

fn find(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is a C string.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// Has QEMU register its types and fill in their classes now, rather than in each child: 5 ms and
/// 2 MB of each. Both functions do nothing when `main` calls them again.
///
/// `module_call_init` is of QEMU's `include/qemu/module.h`, and `MODULE_INIT_QOM` the fourth of its
/// kinds; `object_class_get_list` of `include/qom/object.h`: it fills in the classes that it lists.
pub(crate) fn register_types() {
    const MODULE_INIT_QOM: c_int = 3;
    type CallInit = unsafe extern "C" fn(c_int);
    type GetList = unsafe extern "C" fn(*const c_char, bool) -> *mut c_void;
    let (call_init, get_list) = (find(c"module_call_init"), find(c"object_class_get_list"));
    let (Some(call_init), Some(get_list)) = (call_init, get_list) else {
        return;
    };
    // SAFETY: QEMU's functions of these names have these types. The list is not freed, as little as
    // what it lists.
    unsafe {
        transmute::<*mut c_void, CallInit>(call_init)(MODULE_INIT_QOM);
        transmute::<*mut c_void, GetList>(get_list)(c"object".as_ptr(), true);
    }
}

/// Replaces libfdt's function that makes an empty device tree and clears all the room that it is given.
/// QEMU gives it 1 MiB, of which its machine uses a few kilobytes, and grows the tree to all of that
/// afterwards by `fdt_open_into`, which clears nothing.
///
/// # Safety
/// As libfdt's: `room` must point to `len` bytes.
#[cfg_attr(feature = "preload", unsafe(no_mangle))]
unsafe extern "C" fn fdt_create(room: *mut c_void, len: c_int) -> c_int {
    /// Enough for an empty tree.
    const ENOUGH: c_int = 64 << 10;
    /// libfdt's `FDT_ERR_INTERNAL`.
    const INTERNAL: c_int = 13;
    type Create = unsafe extern "C" fn(*mut c_void, c_int) -> c_int;
    // SAFETY: the name is a C string.
    let create = unsafe { libc::dlsym(libc::RTLD_NEXT, c"fdt_create".as_ptr()) };
    if create.is_null() {
        return -INTERNAL;
    }
    // SAFETY: libfdt's function has this type; its room is part of what the caller has.
    unsafe { transmute::<*mut c_void, Create>(create)(room, len.min(ENOUGH)) }
}
