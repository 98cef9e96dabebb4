//! The C ABI: what `include/compactattn.h` declares, and nothing else, crosses here.
//!
//! Every function checks all it is given before it touches memory, stops panics, and answers with a status. The docs
//! of the exported items are the header's.
#![expect(non_camel_case_types, reason = "names are those of the C header")]

mod api_attend;
mod api_combine;
mod api_context;
mod api_export;
mod api_info;
mod api_plan;
mod api_settings;
mod api_stages;
mod batch;
mod check;
mod device;
mod device_tables;
mod guard;
mod handle;
mod merge;
mod objects;
mod read;
mod registry;
mod settings;
mod status;
mod structs;
mod structs_step;
mod table;
mod tensor;
mod views;

pub use api_attend::{compactattn_attend, compactattn_forward};
pub use api_combine::compactattn_combine;
pub use api_context::{compactattn_context_create, compactattn_context_destroy};
pub use api_export::{compactattn_table_export_csr, compactattn_table_export_padded};
pub use api_info::{
    compactattn_abi_version, compactattn_build_info, compactattn_last_error, compactattn_status_string,
    compactattn_version,
};
pub use api_plan::{
    compactattn_plan_create, compactattn_plan_destroy, compactattn_plan_sizes, compactattn_plan_stats,
    compactattn_summary_bytes, compactattn_supports,
};
pub use api_settings::{
    compactattn_settings_from_env, compactattn_settings_from_mode, compactattn_settings_init,
};
pub use api_stages::{
    compactattn_select, compactattn_summaries_update, compactattn_table_build, compactattn_union,
};
pub use status::compactattn_status;
pub use structs::{
    compactattn_context, compactattn_context_desc, compactattn_device_kind, compactattn_dtype,
    compactattn_keep, compactattn_keep_at, compactattn_mode, compactattn_plan, compactattn_plan_desc,
    compactattn_selector, compactattn_settings, compactattn_tensor, compactattn_which,
};
pub use structs_step::{
    compactattn_attend_args, compactattn_batch, compactattn_combine_args, compactattn_csr,
    compactattn_forward_args, compactattn_padded, compactattn_selection, compactattn_sizes,
    compactattn_stats, compactattn_summaries, compactattn_table,
};
