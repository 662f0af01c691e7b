# find_package(trimtab) gives trimtab::trimtab: the C interface and libtrimtab.so. Point CMake here
# with -Dtrimtab_DIR=`python -m trimtab --cmakedir`.
get_filename_component(trimtab_root "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
if(NOT EXISTS "${trimtab_root}/lib/libtrimtab.so")
  set(trimtab_FOUND FALSE)
  set(trimtab_NOT_FOUND_MESSAGE "no libtrimtab.so in ${trimtab_root}/lib; build trimtab first")
  return()
endif()
if(NOT TARGET trimtab::trimtab)
  add_library(trimtab::trimtab SHARED IMPORTED)
  set_target_properties(trimtab::trimtab PROPERTIES
    IMPORTED_LOCATION "${trimtab_root}/lib/libtrimtab.so"
    INTERFACE_INCLUDE_DIRECTORIES "${trimtab_root}/include")
endif()
