# find_package(compactattn): targets compactattn::shared and compactattn::static. The tree may be moved as a whole.

get_filename_component(_compactattn_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET compactattn::shared)
  add_library(compactattn::shared SHARED IMPORTED)
  set_target_properties(compactattn::shared PROPERTIES
    IMPORTED_LOCATION "${_compactattn_prefix}/lib/libcompactattn.so"
    INTERFACE_INCLUDE_DIRECTORIES "${_compactattn_prefix}/include")
endif()

if(NOT TARGET compactattn::static)
  add_library(compactattn::static STATIC IMPORTED)
  # The archive holds the Rust runtime: without --exclude-libs a shared library made from it exports all of that.
  # Libraries are those of: cargo rustc --lib --crate-type staticlib -- --print native-static-libs
  set_target_properties(compactattn::static PROPERTIES
    IMPORTED_LOCATION "${_compactattn_prefix}/lib/libcompactattn.a"
    INTERFACE_INCLUDE_DIRECTORIES "${_compactattn_prefix}/include"
    INTERFACE_LINK_OPTIONS "LINKER:--exclude-libs,libcompactattn.a"
    INTERFACE_LINK_LIBRARIES "gcc_s;util;rt;pthread;m;dl;c")
endif()

unset(_compactattn_prefix)
